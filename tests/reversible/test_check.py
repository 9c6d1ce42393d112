"""Reports tell the truth: exact where it is, and what and where where it is not."""

import pytest
import torch
