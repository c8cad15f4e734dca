"""`farpoint demo`: the whole line on one host with everything real, ending in a comparison byte for byte."""
