"""Forward a port: `python forward.py PORT HOST:PORT...`, each connection to the next of the addresses."""

import asyncio
import sys
from itertools import cycle


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _main(port: str, *addresses: str) -> None:
    next_address = cycle(addresses)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, number = next(next_address).rpartition(":")
        try:
            back, forth = await asyncio.open_connection(host, int(number))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, forth), _copy(back, writer))

    server = await asyncio.start_server(accept, None, int(port))
    await server.serve_forever()


asyncio.run(_main(*sys.argv[1:]))
