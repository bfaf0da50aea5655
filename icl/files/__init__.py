"""Files as bytes, text, arrays and tables: read within bounds, written safely."""
