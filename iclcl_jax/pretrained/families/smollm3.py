"""SmolLM3: a Llama with every fourth layer unrotated."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Layer


@_decoder.family(groups=4)
def from_smollm3(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `smollm3`."""
  config, size = decoder.config, decoder.num_layers
  bias = config.switch('attention_bias', False)
  interval = config.count('no_rope_layer_interval', 4)
  # 0 stands for a layer without rotation, whatever the name says.
  rotated = config.entries('no_rope_layers', size, (0, 1)) or [
    (i + 1) % interval != 0 for i in range(size)
  ]
  config.get('max_window_layers')  # The rotations decide.
  has_window = config.switch('use_sliding_window', False)
  window = decoder.window()
  local = decoder.local(lambda i: has_window and not rotated[i])
  rotation = decoder.rotary(base=2e6)
  return decoder.language_model(
    decoder.attention(bias=bias, output_bias=bias)
    | decoder.network(bias=config.switch('mlp_bias', False))
    | decoder.pre_norms(),
    decoder.functions(1e-6),
    layers=[
      Layer(
        rotation=rotation if rotated[i] else None,
        window=window if local[i] else None,
      )
      for i in range(size)
    ],
    tied=True,
  )
