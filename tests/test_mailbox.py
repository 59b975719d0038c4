"""The mailbox between the engine thread and an event loop."""

import asyncio
import threading

import pytest

from tritium.mailbox import AsyncMailbox
from tritium.runtime.outputs import StepOutput
from tritium.runtime.stream import ListenerGone


def output(number):
    return StepOutput(str(number), "", (number,))


def test_everything_posted_arrives_in_order_in_its_own_queue():
    async def run():
        mailbox = AsyncMailbox(asyncio.get_running_loop())
        queues = [asyncio.Queue(), asyncio.Queue()]

        def post():
            for i in range(1000):
                mailbox.post(queues[i % 2], output(i))

        threading.Thread(target=post).start()
        return [[(await queue.get()).token_ids[0] for _ in range(500)] for queue in queues]

    even, odd = asyncio.run(run())
    assert even == list(range(0, 1000, 2))
    assert odd == list(range(1, 1000, 2))


def test_a_burst_wakes_the_event_loop_once():
    async def run():
        loop = asyncio.get_running_loop()
        calls = []
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), real(*args))
        mailbox, queue = AsyncMailbox(loop), asyncio.Queue()
        for i in range(10):
            mailbox.post(queue, output(i))
        for _ in range(10):
            await queue.get()
        return len(calls)

    assert asyncio.run(run()) == 1


def test_posting_to_a_closed_event_loop_raises_every_time():
    loop = asyncio.new_event_loop()
    mailbox = AsyncMailbox(loop)
    loop.close()
    for i in range(2):
        with pytest.raises(ListenerGone, match="closed"):
            mailbox.post(asyncio.Queue(), output(i))
