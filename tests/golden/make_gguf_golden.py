"""Makes smollm2_weights.json: SHA-256 of SmolLM2's weights as transformers reads them from the GGUF file.

python -m tests.golden.make_gguf_golden        # transformers 5.23.0, torch 2.13.0, Python 3.11
"""

import hashlib
import json
import os
import pathlib

from transformers import AutoModelForCausalLM

from kvattn import formats

if __name__ == "__main__":
    folder, name = os.path.split(formats.smollm2_path())
    state = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").state_dict()
    keep = ("model.embed_tokens.", "model.norm.", "model.layers.0.", "model.layers.29.")
    hashes = {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in state.items() if key.startswith(keep)
    }
    out = pathlib.Path(__file__).with_name("smollm2_weights.json")
    out.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
