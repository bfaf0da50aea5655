"""Read files within limits and write them safely, as bytes, text, arrays and tables."""
