"""Large-batch training of image classifiers with DeepSpeed, after Goyal et al. 2017 (arXiv 1706.02677)."""
