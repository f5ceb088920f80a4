"""`make demo-gateway`: the openai SDK, the gateway, a local platform and the real worker.

The SDK is told another base URL and nothing else. Shows its own lines, the answer as it arrives,
and searches what the platform carried for the text.
"""

import asyncio
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai

from tools.demo_search import show_search
from tools.demo_stage import ROOT, DemoFailed, Screen, Stage, perform, stage

PROMPT = "Explain in three sentences why the sky is blue."
MAX_TOKENS = 120
GATEWAY = (sys.executable, str(ROOT / "client.py"), "serve", "--port", "0")

PROGRAM = """\
client = openai.OpenAI(base_url="{base_url}", api_key="anything")
stream = client.chat.completions.create(
    model="{model}", stream=True, temperature=0, max_tokens={max_tokens},
    messages=[{{"role": "user", "content": "{prompt}"}}],
)"""
"""What is shown of `ask`."""


async def run(screen: Screen) -> None:
    """Run the demo; DemoFailed with what to look at."""
    say = screen.console.print
    async with stage(screen) as set_up, gateway(set_up, screen) as base_url:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="anything") as client:
            model = (await client.models.list()).data[0].id
            shown = PROGRAM.format(
                base_url=base_url, model=model, max_tokens=MAX_TOKENS, prompt=PROMPT
            )
            say(f"\n{textwrap.indent(shown, '    ')}\n", style="bold", markup=False)
            answer, first_s = await ask(client, model)
        say(f"\n\nFirst words after {first_s:.1f} s, through the gateway.", style="dim")
        show_search(screen.console, PROMPT, answer, set_up.platform.exchanged)
        say()


async def ask(client: openai.AsyncOpenAI, model: str) -> tuple[str, float]:
    """Print the answer as it arrives; return it and the seconds to its first words."""
    began, first_s, answer = time.monotonic(), 0.0, ""
    stream = await client.chat.completions.create(
        model=model,
        stream=True,
        temperature=0,
        max_tokens=MAX_TOKENS,
        messages=[{"role": "user", "content": PROMPT}],
    )
    async for chunk in stream:
        if delta := chunk.choices[0].delta.content:
            first_s = first_s or time.monotonic() - began
            answer += delta
            sys.stdout.write(delta)
            sys.stdout.flush()
    return answer, first_s


@asynccontextmanager
async def gateway(set_up: Stage, screen: Screen) -> AsyncIterator[str]:
    """Start the gateway, print what it prints, and give its base URL."""
    screen.console.print("[bold]$ python client.py serve[/]")
    process = await asyncio.create_subprocess_exec(
        *GATEWAY,
        env=set_up.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C is passed on below, once.
        start_new_session=True,
    )
    assert process.stdout
    base_url = ""
    try:
        while line := (await process.stdout.readline()).decode():
            screen.console.print(line.rstrip(), markup=False)
            base_url = base_url or line.split()[-1]
            if line.startswith("models"):
                break
        else:
            raise DemoFailed(f"the gateway ended with exit code {await process.wait()}")
        yield base_url
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()


if __name__ == "__main__":
    sys.exit(perform(run))
