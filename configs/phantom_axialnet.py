"""A small AxialNet on phantom CTs: the demo's network, to change and to play with.

    hirescam train configs/phantom_axialnet.py --run runs/phantom

About a minute and a half on two CPU cores. Expect a test AUROC of about 0.78 and an OrganIoU of
about 0.5 (`hirescam evaluate runs/phantom`); with --mask-weight 0 the OrganIoU falls to about 0.3.
"""

from hirescam_jax.experiments.demo import demo_config

config = demo_config()
