"""What is run to show something; nothing else of the package knows of it.

demo.py, demo_page.py  the demonstration and its page; read this first
papers.py              the experiments of the papers, and how they are made small
voc/                   Grad-CAM against HiResCAM on PASCAL VOC
"""
