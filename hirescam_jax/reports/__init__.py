"""What people look at: pictures, pages, tables, aligned text.

text.py, tables.py  text;  pictures.py  slices with a map
store_page.py       the page of `hirescam inspect`; templates/ has the HTML
"""
