"""Families of models: one file and one line here for each.

A reader makes a `LanguageModel` of a `Checkpoint`. Each takes every tensor, and
reads every setting that might change what the model computes.
"""

from iclcl_jax.pretrained.families.bert import from_bert
from iclcl_jax.pretrained.families.gemma import from_gemma2, from_gemma3
from iclcl_jax.pretrained.families.gpt2 import from_gpt2
from iclcl_jax.pretrained.families.gpt_neox import from_gpt_neox
from iclcl_jax.pretrained.families.gpt_oss import from_gpt_oss
from iclcl_jax.pretrained.families.llama import from_llama
from iclcl_jax.pretrained.families.mistral import from_mistral
from iclcl_jax.pretrained.families.olmo2 import from_olmo2
from iclcl_jax.pretrained.families.phi3 import from_phi3
from iclcl_jax.pretrained.families.qwen import from_qwen2, from_qwen3
from iclcl_jax.pretrained.families.smollm3 import from_smollm3

FAMILIES = {
  'bert': from_bert,
  'gemma2': from_gemma2,
  'gemma3_text': from_gemma3,
  'gpt2': from_gpt2,
  'gpt_neox': from_gpt_neox,
  'gpt_oss': from_gpt_oss,
  'llama': from_llama,
  'mistral': from_mistral,
  'olmo2': from_olmo2,
  'phi3': from_phi3,
  'qwen2': from_qwen2,
  'qwen3': from_qwen3,
  'smollm3': from_smollm3,
}
