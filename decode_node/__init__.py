"""The decode worker: fetch, decompress, decode, commit new blocks."""

from kvstrata.decode_node.node import DecodeNode

__all__ = ["DecodeNode"]
