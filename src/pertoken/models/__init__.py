"""Adapters: one per architecture family, and the two ways of running a stack of layers."""

from pertoken.models.adapter import Adapter, UnknownFamily, adapter_for, families
from pertoken.models.load import load, resolve

__all__ = ["Adapter", "UnknownFamily", "adapter_for", "families", "load", "resolve"]
