"""Tables of plain rows, as text and as HTML. Does not depend on layers."""
