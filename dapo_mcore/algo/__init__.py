"""DAPO's maths on plain values and tensors. References are to the paper, arXiv:2503.14476."""
