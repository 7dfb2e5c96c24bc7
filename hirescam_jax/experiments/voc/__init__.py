"""Grad-CAM against HiResCAM on PASCAL VOC 2012's class masks.

compare.py   `hirescam voc`; read this first
photos.py    the data;  training.py  the two heads;  maps.py  the maps and their measures
faithful.py  insertion, deletion, ROAD;  page.py  the page
"""
