"""`icl report`: one self-contained HTML page about one or more runs. The page needs no network and no scripts.

- `facts.py` reads a run's folder, and lists what is missing or damaged.
- `tables.py` and `pictures.py` turn tables and figures into parts of a page.
- `findings.py` extracts the state and the main numbers of a run.
- `sections.py` and `comparison.py` choose what the page shows, and explain it.
- `page.py` writes the page from the template `page.html`. The template escapes all text that comes from a file.
"""
