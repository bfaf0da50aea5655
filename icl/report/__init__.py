"""One self-contained HTML page of a run, or of several beside each other, that reads without network or script.

`facts.py` reads a run's folder and says what is missing or damaged; `tables.py` and `pictures.py` turn tables and figures
into what a page can show; `findings.py` has the numbers that one looks for first; `sections.py` and `comparison.py`
choose and word what is shown; `page.py` writes it through the template. Everything that comes from a file is escaped by
the template engine.
"""
