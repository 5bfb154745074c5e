"""Factored layers, where they start, and the surgery that puts them into a model and takes them out again."""

from nativerank.layers.base import FactorLayer, Gemm
from nativerank.layers.discover import Matrix, linear_modules, matrix_parameters
from nativerank.layers.experts import LowRankExperts
from nativerank.layers.factorize import factorize_modules, to_dense_modules
from nativerank.layers.guided import GuidedLinear, Guides, guided_layers
from nativerank.layers.initialize import (
    dense_init,
    gaussian_spectrum,
    init_factor_layer,
    init_seed,
    sampled_factors,
    truncated_svd,
)
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.rank import DEFAULT_RATIO, break_even_rank, rank_from_ratio
from nativerank.layers.report import FactorizeEntry, FactorizeReport
from nativerank.layers.shared import join_products
from nativerank.layers.spectral import SpectralLinear

__all__ = [
    "DEFAULT_RATIO",
    "FactorLayer",
    "FactorizeEntry",
    "FactorizeReport",
    "Gemm",
    "GuidedLinear",
    "Guides",
    "LowRankExperts",
    "LowRankLinear",
    "Matrix",
    "SpectralLinear",
    "break_even_rank",
    "dense_init",
    "factorize_modules",
    "gaussian_spectrum",
    "guided_layers",
    "init_factor_layer",
    "init_seed",
    "join_products",
    "linear_modules",
    "matrix_parameters",
    "rank_from_ratio",
    "sampled_factors",
    "to_dense_modules",
    "truncated_svd",
]
