"""Connectors between vision and language, by the names that configs and recipes use.

| name         | from               | what it is                                               | 729 tokens become |
|--------------|--------------------|----------------------------------------------------------|-------------------|
| mlp          | ML-Mamba, eq. 6    | three-layer MLP                                          | 729               |
| msc_basic    | ML-Mamba, eq. 7    | Mamba-2 scan, then the MLP                               | 729               |
| msc_advanced | ML-Mamba, eq. 8    | scan, SwiGLU, then the MLP; the paper's final model      | 729               |
| vl_mlp       | VL-Mamba, sec. 3.2 | two-layer MLP                                            | 729               |
| vss_mlp      | VL-Mamba, sec. 3.2 | scan with skip and norm, then a two-layer MLP            | 729               |
| vss_l2       | VL-Mamba, sec. 3.2 | linear, scan with skip and norm, linear; its final model | 729               |
| fused_mlp    | Cobra, sec. 3.2    | three-layer MLP, the same module as `mlp`                | 729               |
| ldpv2        | Cobra, table 5     | two-layer MLP, pooling, depthwise convolution            | 196               |

Where ML-Mamba's paper and its released code differ, the config chooses. `layout` (of the two MSC): "paper", the
default, because it is what the paper describes and ablates; "released" for its published weights. `scan`: "bsm", the
paper's final model and all that was released, or "csm" (mlmamba/scan2d.py). `merge`: "mean", as in the released code,
or "sum", as in VMamba. Where the equations leave open what only figures and code show (residual connections around scan
and SwiGLU, a final norm), both layouts follow the code.

Each class is in mlmamba/connectors. To add one: subclass `Connector` and enter it here.
"""

from mlmamba.connectors.base import Connector
from mlmamba.connectors.msc import MSCAdvanced, MSCBasic
from mlmamba.connectors.plain import LDPv2Connector, MLPConnector, VLMLPConnector
from mlmamba.connectors.vss import VSSL2Connector, VSSMLPConnector
from mlmamba.image_layout import ImageLayout, TokensPerImage
from mlmamba.vision import measure

CONNECTORS: dict[str, type[Connector]] = {
    "mlp": MLPConnector,
    "msc_basic": MSCBasic,
    "msc_advanced": MSCAdvanced,
    "vl_mlp": VLMLPConnector,
    "vss_mlp": VSSMLPConnector,
    "vss_l2": VSSL2Connector,
    "fused_mlp": MLPConnector,
    "ldpv2": LDPv2Connector,
}


def connector_class(name: str) -> type[Connector]:
    """The class behind a name.

    Raises:
        ValueError: unknown name.
    """
    if name not in CONNECTORS:
        raise ValueError(f"unknown connector {name!r}; choose one of {', '.join(CONNECTORS)}")
    return CONNECTORS[name]


def build_connector(width: int, out: int, config) -> Connector:
    """Connector named by `config.name`, from vision width to language width.

    Raises:
        ValueError: unknown name, scan, merge or layout, or sizes that do not fit.
    """
    return connector_class(config.name)(width, out, config)


def image_layout(config, grid: tuple[int, int] | None = None) -> ImageLayout:
    """How images are cut for an MLMambaConfig's model, and how many placeholders each takes; allocates no weights.

    Args:
        grid: as `measure` gives it, where that is known.

    Raises:
        ValueError: unknown connector, one that takes no images at their own size where they are so read, or encoders
            that cannot be built or do not fit together.
    """
    vision, connector = config.vision_config, connector_class(config.connector_config.name)
    grid = grid or measure(vision)[1]
    if not vision.native:
        return ImageLayout(connector.tokens(grid), vision.image_size, vision.tiles)
    for rows, columns in ((1, 1), (2, 3), (5, 2)):
        if connector.grid_out((rows * connector.pool, columns * connector.pool)) != (rows, columns):
            raise ValueError(
                f"connector {config.connector_config.name!r} does not make one token of {connector.pool} x "
                f"{connector.pool} cells on any grid, so it takes no images at their own size: choose another, or "
                "leave out vision.max_tokens"
            )
    sizes = {"min_tokens": vision.min_tokens, "max_tokens": vision.max_tokens}
    return ImageLayout(patch=grid[0], merge=vision.merge, pool=connector.pool, **sizes)


def tokens_per_image(config) -> TokensPerImage:
    """How many placeholders one image takes in a prompt of an MLMambaConfig's model, or what decides it.

    Raises:
        ValueError: as `image_layout`.
    """
    return image_layout(config).per_image
