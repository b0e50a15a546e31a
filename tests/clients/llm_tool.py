"""The `llm` command, with a model of `extra-openai-models.yaml`, and its Python face for a tool."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from expected import KEY, TEXT, URL, done

FILE = """
- model_id: fleet
  model_name: {name}
  api_base: {url}/v1
  api_key_name: fleet
  supports_tools: true
- model_id: stranger
  model_name: nobody
  api_base: {url}/v1
  api_key_name: fleet
- model_id: busy
  model_name: busy
  api_base: {url}/v1
  api_key_name: fleet
- model_id: breaks
  model_name: breaks
  api_base: {url}/v1
  api_key_name: fleet
"""


def llm(*words):
    """Run the command."""
    command = [sys.executable, "-m", "llm", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    Path(folder, "extra-openai-models.yaml").write_text(FILE.format(name="llama", url=URL))
    assert llm("keys", "set", "fleet", "--value", KEY).returncode == 0
    assert llm("-m", "fleet", "Hi", "--no-stream").stdout.strip() == TEXT
    assert llm("-m", "fleet", "Hi").stdout.strip() == TEXT
    failed = llm("-m", "stranger", "Hi")
    assert failed.returncode != 0
    assert "no model is called 'nobody'" in failed.stderr
    for name, why in (("busy", "429"), ("breaks", "the answer broke off")):
        failed = llm("-m", name, "Hi")
        assert failed.returncode != 0
        assert why in failed.stderr

    import llm as library

    cities = []

    def weather(city: str) -> str:
        """The weather in a city."""
        cities.append(city)
        return "Sunny."

    model = library.get_model("fleet")
    chain = model.chain("Hi", tools=[weather], key=KEY)
    assert chain.text().strip() == TEXT
    assert cities == ["Rome"]

done(f"llm {version('llm')}")
