"""What people look at: pictures, pages, tables, aligned text.

text.py, tables.py  text
figures.py          what all figures share: colours, charts, a CT in grey, PNG
pictures.py         slices of a CT with a map: read this first
pages.py            HTML from templates/, of which base.html has the style of all pages
store_page.py       the page of `hirescam inspect`; the others are in experiments/
"""
