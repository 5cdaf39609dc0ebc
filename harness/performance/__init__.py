"""What a routed pass costs beside the base pass and its peers: interleaved ratios, published by one command.

python -m harness.performance                 every cell, into performance/ (tox -e bench)
python -m harness.performance --quick         one small cell of each kind
python -m harness.performance --publish DIR   the page and its pictures from the cells that are there
"""
