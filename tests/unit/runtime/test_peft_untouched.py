"""Nothing of PEFT is changed for the process: its classes and functions are the same objects before and after routing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora, tuners_utils, adalora
import peft.peft_model, peft.utils.other, peft.utils.save_and_load, peft.tuners.lora.variants, peft.mapping, peft.mapping_func
from transformers import LlamaConfig, LlamaForCausalLM

def everything():
    found = {}
    for name, module in sys.modules.items():
        if name == "peft" or name.startswith("peft.") or name == "transformers.modeling_utils":
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__.startswith("peft"):
                    found.update({(name, key, member): what for member, what in vars(value).items()})
    return found

def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    made = get_peft_model(base, LoraConfig(**options, use_dora=True, modules_to_save=["lm_head"]), adapter_name="expert_0").eval()
    made.add_adapter("expert_1", LoraConfig(**options))
    return made

ids = torch.arange(6)[None]
untouched = model()(ids).logits
known = set(sys.modules)
before = everything()
from dylo_moe import DynamicHybridRouter, attach_router, detach_router
routed, detached = attach_router(model(), DynamicHybridRouter(16, 2).eval()), attach_router(model(), None)
routed(ids), detached(ids, expert_id=0)
detach_router(detached)
changed = [key for key, value in everything().items() if key[0] in known and before.get(key, value) is not value]
added = [key for key in everything().keys() - before.keys() if key[0] in known and not key[1].startswith("__")]
lost = before.keys() - everything().keys()
ignored = {("peft.utils.other", "__warningregistry__")}
assert not [key for key in changed if key not in ignored], changed
assert not lost, lost
# What remains are submodules that an import made known to their package.
assert all(f"{key[0]}.{key[1]}" in sys.modules for key in added), added
assert torch.equal(model()(ids).logits, untouched)
assert not torch.equal(routed(ids).logits, untouched)
print("unchanged", len(before))
"""


def test_peft_is_the_same_before_and_after_routing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 5000
