"""What token ids stand for: rows of the model's table, or pieces of images that are held here."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvstrata.engine.images import Image
from kvstrata.engine.vision import VisionTower
from kvstrata.protos.identity import image_token_ids, is_of_image

MAX_IDLE = 64  # images that stay after their last request, for the next one


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Which tokens of a pass are pieces of images, and their embeddings.

    Attributes:
        at: int64 (n,), ascending: places in the pass.
        rows: (n, width).
    """

    at: torch.Tensor
    rows: torch.Tensor


class HeldImages:
    """The embeddings of the images of running requests, by token id. Thread-safe.

    An image is seen once while anybody holds it, and the newest stay for a while.

    Attributes:
        num_seen: How often the tower ran.
    """

    def __init__(self, tower: VisionTower | None) -> None:
        """Start with none; without a tower there never are any."""
        self._tower = tower
        self._lock = threading.Lock()
        self._holders: Counter[bytes] = Counter()
        self._seen: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._piece_of: dict[int, torch.Tensor] = {}
        self.num_seen = 0

    @contextmanager
    def hold(self, images: Sequence[Image]) -> Iterator[None]:
        """Make the tokens of images known, for as long as the block runs.

        Raises:
            ImageError: The model's processor refuses an image.
        """
        self.acquire(images)
        try:
            self.see(images)
            yield
        finally:
            self.release(images)

    def acquire(self, images: Sequence[Image]) -> None:
        """Let images stay from when they are seen until ``release``, which must follow."""
        with self._lock:
            self._holders.update(image.digest for image in images)

    def see(self, images: Sequence[Image]) -> None:
        """Make the tokens of acquired images known; runs the tower over those that are new.

        Raises:
            ImageError: The model's processor refuses an image.
        """
        for image in images:
            digest = image.digest
            with self._lock:
                if digest in self._seen:
                    self._seen.move_to_end(digest)
                    continue
            assert self._tower is not None, "admission refuses images for a model without a tower"
            seen = self._tower.see(image)
            with self._lock:
                self.num_seen += 1
                self._seen[digest] = seen
                self._piece_of.update(zip(image_token_ids(digest, len(seen)), seen, strict=True))

    def release(self, images: Sequence[Image]) -> None:
        """End ``acquire``; the oldest images that nobody holds are forgotten."""
        with self._lock:
            self._holders.subtract(image.digest for image in images)
            self._holders += Counter()  # drops what nobody holds
            self._forget()

    def _forget(self) -> None:
        idle = [digest for digest in self._seen if digest not in self._holders]
        for digest in idle[: max(0, len(idle) - MAX_IDLE)]:
            seen = self._seen.pop(digest)
            for token_id in image_token_ids(digest, len(seen)):
                self._piece_of.pop(token_id, None)

    def split(self, token_ids: Sequence[int]) -> tuple[Sequence[int], ImageRows | None]:
        """Return ids of the vocabulary, 0 in the place of images, and what stands there.

        Raises:
            ValueError: An image that is not held.
        """
        at = [i for i, token_id in enumerate(token_ids) if is_of_image(token_id)]
        if not at:
            return token_ids, None
        with self._lock:
            rows = [self._piece_of.get(token_ids[i]) for i in at]
        found = [row for row in rows if row is not None]
        if len(found) < len(at):
            raise ValueError(f"{len(at) - len(found)} tokens are of images that are not held here")
        words = [0 if is_of_image(token_id) else token_id for token_id in token_ids]
        return words, ImageRows(torch.tensor(at), torch.stack(found))
