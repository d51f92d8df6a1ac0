"""Tables of plain rows, as text and as HTML. Knows nothing of layers."""
