"""Search of one level's bank: queries of an image against the rows of K = 4 and K = 16."""

from functools import partial
from typing import Any

import torch
from common import arguments, matmul_rate, seconds, write
from torch.nn.functional import normalize

from anomalib_mvfa.model.memory_bank import nearest_distance

PATCHES, TOKENS, WIDTH = 289, 290, 768


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    figures: dict[str, Any] = {"matmul_gflops": matmul_rate(options) / 1e9}
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, PATCHES, WIDTH, generator=generator).to(options.device)
    for k_shot in (4, 16):
        rows = normalize(torch.randn(11 * k_shot * TOKENS, WIDTH, generator=generator), dim=-1).to(options.device)
        took = seconds(partial(nearest_distance, query, rows), options.device)
        figures[f"k{k_shot}_seconds"] = took / len(query)
        figures[f"k{k_shot}_gflops"] = 2 * query.shape[0] * PATCHES * len(rows) * WIDTH / took / 1e9
    write("bank", options, figures)


if __name__ == "__main__":
    main()
