"""What frozen blocks make of an image that comes again in every epoch, so that they run once.

Axes: l level, B images, L tokens (class token first), D width of the image tower.
"""

from collections.abc import Callable, Hashable

import torch

LIMIT = 2 * 2**30
"""Bytes of tokens that are kept; 400 images of ViT-L at four levels, 1,600 at one."""
SEED = 0


class FrozenCache:
    """Tokens of images, found by all pixels of an image: one that was changed at random is another image.

    It fills up to its limit (bytes) and then stays as it is. Copied or pickled, it is empty.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._condition: Hashable = None
        self.clear()

    def __len__(self) -> int:
        """Return the number of images that are kept."""
        return len(self._kept)

    def __reduce__(self) -> tuple:
        return FrozenCache, (self.limit,)

    def clear(self) -> None:
        """Forget everything."""
        self._kept: dict[int, torch.Tensor] = {}
        self._bytes = 0
        self._factors = torch.empty(0)

    @torch.no_grad()
    def tokens(
        self,
        image: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
        condition: Hashable = None,
    ) -> torch.Tensor:
        """Return tokens ``(l, B, L, D)`` of images ``(B, 3, H, W)``, computing those that are not kept.

        ``condition`` is what else ``compute`` depends on; under another one, and on another device, all is forgotten.
        """
        condition = (condition, image.device)
        if condition != self._condition:
            self.clear()
            self._condition = condition
        keys = self._keys(image)
        missing = [row for row, key in enumerate(keys) if key not in self._kept]
        found: dict[int, torch.Tensor] = {}
        if missing:
            found = dict(zip((keys[row] for row in missing), compute(image[missing]).unbind(1), strict=True))
        for key, tokens in found.items():
            if self._bytes + tokens.nbytes <= self.limit:
                self._kept[key] = tokens.clone()
                self._bytes += tokens.nbytes
        return torch.stack([self._kept[key] if key in self._kept else found[key] for key in keys], dim=1)

    def _keys(self, image: torch.Tensor) -> list[int]:
        """Hash all pixels of each image, on its device: sums of products modulo 2**64 do not depend on their order."""
        bits = image.detach().float().contiguous().view(torch.int32).flatten(1).long()
        if self._factors.numel() != bits.shape[1]:
            generator = torch.Generator().manual_seed(SEED)
            odd = 2 * torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator) + 1
            self._factors = odd.to(image.device)
        return (bits * self._factors).sum(dim=1).tolist()
