"""The configs that there are, by the command that takes them."""

from npr_jax.evaluate.generate import GenerateConfig
from npr_jax.evaluate.run import EvalConfig
from npr_jax.serve.config import ServeConfig
from npr_jax.train.beta import BetaConfig
from npr_jax.train.mine import MineConfig
from npr_jax.train.papo import PapoConfig
from npr_jax.train.zero import ZeroConfig

CONFIGS = {
    cls.command: cls
    for cls in (
        ZeroConfig,
        BetaConfig,
        PapoConfig,
        EvalConfig,
        GenerateConfig,
        ServeConfig,
        MineConfig,
    )
}
