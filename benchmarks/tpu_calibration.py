"""Published times on TPUs that the time model is compared with."""

import dataclasses

from benchmarks import tpu_cases
from benchmarks.tpu_cases import SplashShape, SplashTiles

_GUIDE = "JAX, Pallas TPU guide 'Matrix Multiplication' (docs/pallas/tpu/matmul.ipynb, recorded outputs)"
_TOKAMAX = "openxla/tokamax 783ea95, tokamax/data/autotuning/{}/pallas_mosaic_tpu_flash_attention.json"


@dataclasses.dataclass(frozen=True)
class Published:
    """A call that somebody timed.

    Attributes:
      chip: on which.
      milliseconds: the published time.
      source: where it stands.
      product: m, k, n of a bfloat16 product, with the Pallas kernel's tiles (None: XLA's own).
      attention: shape and tiles of splash attention's forward.
    """

    chip: str
    milliseconds: float
    source: str
    product: tuple[int, int, int, tuple[int, int, int] | None] | None = None
    attention: tuple[SplashShape, SplashTiles] | None = None

    def build(self) -> tpu_cases.Built:
        """The function to compile and its arguments' shapes."""
        if self.product is not None:
            return tpu_cases.matmul(*self.product)
        return tpu_cases.dense_splash(*self.attention)


def _square(size: int, tiles: tuple[int, int, int] | None, milliseconds: float) -> Published:
    return Published("v5e", milliseconds, _GUIDE, product=(size, size, size, tiles))


def _attention(chip: str, milliseconds: float, shape: SplashShape, tiles: SplashTiles) -> Published:
    folder = {"v5p": "tpu_v5", "v6e": "tpu_v6_lite"}[chip]
    return Published(chip, milliseconds, _TOKAMAX.format(folder), attention=(shape, tiles))


_SMALL, _LARGE = (128, 128, 128), (512, 1024, 1024)

CASES = {
    "matmul 8192 tiles 128": _square(8192, _SMALL, 91.84),
    "matmul 4096 tiles 512": _square(4096, _LARGE, 0.8891),
    "matmul 8192 tiles 512": _square(8192, _LARGE, 6.099),
    "matmul 4096 XLA": _square(4096, None, 0.8273),
    "matmul 8192 XLA": _square(8192, None, 6.047),
    "splash v5p 32x4096": _attention("v5p", 18.01, SplashShape(32, 4096, 32, 8, 128), SplashTiles(1024, 1024, 256)),
    "splash v5p 2x8192": _attention("v5p", 1.923, SplashShape(2, 8192, 16, 16, 128), SplashTiles(1024, 1024, 256)),
    "splash v5p 1x16384": _attention("v5p", 3.202, SplashShape(1, 16384, 16, 16, 128), SplashTiles(2048, 2048, 256)),
    "splash v5p 1x16384 full": _attention(
        "v5p", 5.368, SplashShape(1, 16384, 16, 16, 128, causal=False), SplashTiles(2048, 2048, 256)
    ),
    "splash v5p 4x4096": _attention("v5p", 1.237, SplashShape(4, 4096, 16, 16, 128), SplashTiles(1024, 1024, 256)),
    "splash v6e 4x4096": _attention("v6e", 1.577, SplashShape(4, 4096, 16, 16, 128), SplashTiles(1024, 1024, 512)),
    "splash v6e 1x16384": _attention("v6e", 3.981, SplashShape(1, 16384, 16, 16, 128), SplashTiles(2048, 2048, 512)),
    "splash v6e 2x8192": _attention("v6e", 2.432, SplashShape(2, 8192, 16, 16, 128), SplashTiles(2048, 2048, 512)),
    "splash v6e 2x8192 full": _attention(
        "v6e", 3.554, SplashShape(2, 8192, 16, 16, 128, causal=False), SplashTiles(2048, 2048, 512)
    ),
}
