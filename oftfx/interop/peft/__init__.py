"""Directories that HF PEFT wrote, and directories that it reads. PEFT itself is not needed.

A method's file says how one layer's tensors are called there, which spec they stand for, and how
they are converted; everything else is the same for all methods.
"""

from oftfx.interop.peft.directory import CONFIG, TENSORS, holds_peft
from oftfx.interop.peft.lora import LoraReport, LoraSite, write_lora
from oftfx.interop.peft.read import read
from oftfx.interop.peft.write import write

__all__ = [
    "CONFIG",
    "TENSORS",
    "LoraReport",
    "LoraSite",
    "holds_peft",
    "read",
    "write",
    "write_lora",
]
