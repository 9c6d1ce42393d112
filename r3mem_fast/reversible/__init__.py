"""Reversible networks from pretrained Transformers: conversion, the autograd node, and its checks."""

from ..integrations import attention  # noqa: F401  (registers attn_implementation="r3mem")
from .calibration import Calibration, calibrate
from .check import GradientReport, InverseReport, check_gradients, check_inverse
from .compiled import compile_layers, uncompile_layers
from .convert import check_integrity, make_reversible, restore
from .coupling import AdaptedCoupling, AdditiveCoupling, BDIACoupling, MomentumCoupling, ScaledCoupling
from .direction import reading_backward
from .integrity import IntegrityError
from .reference import reference_model
from .replay import replay

__all__ = [
    "AdaptedCoupling",
    "AdditiveCoupling",
    "BDIACoupling",
    "Calibration",
    "GradientReport",
    "IntegrityError",
    "InverseReport",
    "MomentumCoupling",
    "ScaledCoupling",
    "calibrate",
    "check_gradients",
    "check_integrity",
    "check_inverse",
    "compile_layers",
    "make_reversible",
    "reading_backward",
    "reference_model",
    "replay",
    "restore",
    "uncompile_layers",
]
