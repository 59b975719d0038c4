"""Talk to `tritium serve` with the `openai` package: a completion, a chat that streams, several answers with logprobs.

tritium serve examples/demo_model --port 8000
python examples/openai_client.py http://127.0.0.1:8000/v1

Without a URL it starts a server of its own and ends it.
"""

import json
import subprocess
import sys
from pathlib import Path

import openai

MESSAGES = [{"role": "user", "content": "Read a file and count its lines."}]


def main(url: str) -> None:
    """Three requests."""
    client = openai.OpenAI(base_url=url, api_key="none")
    [model] = [each.id for each in client.models.list()]

    answer = client.completions.create(model=model, prompt="def main(", temperature=0, max_tokens=24)
    print(f"completion: {answer.choices[0].text!r}")

    parts = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=24, stream=True)
    print("chat:", [part.choices[0].delta.content for part in parts if part.choices[0].delta.content])

    several = client.completions.create(model=model, prompt="import ", n=3, seed=1, max_tokens=4, logprobs=0)
    for choice in several.choices:
        print(f"answer {choice.index}: {choice.text!r}, log-probability {sum(choice.logprobs.token_logprobs):.2f}")


def with_own_server() -> None:
    """A server on a free port, for as long as `main` runs."""
    command = [sys.executable, "-m", "tritium", "serve", str(Path(__file__).parent / "demo_model"), "--port", "0"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            main(json.loads(server.stdout.readline())["config"]["url"] + "/v1")
        finally:
            server.terminate()


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else with_own_server()
