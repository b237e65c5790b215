"""What Perceiver AR is compared with, written as plainly as it can be and as fast as torch alone allows."""

from benchmarks.baselines.sparse import SparseTransformer
from benchmarks.baselines.transformer import Transformer
from benchmarks.baselines.transformer_xl import TransformerXL

__all__ = ["SparseTransformer", "Transformer", "TransformerXL"]
