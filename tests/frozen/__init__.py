"""Recordings of the second format as it was first written, and what is in them: every later version reads them."""
