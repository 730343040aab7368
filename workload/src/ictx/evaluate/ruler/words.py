"""Random words: keys, values, names and coded words."""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable
from random import Random


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _listed("""
    able amber ample angry azure basic brave brief bright broad calm candid careful cheap clean clear clever cold
    cool crisp curious dark dear deep dense dry dull eager early easy empty exact fair famous fast firm flat fond
    formal frail free fresh full funny gentle giant glad golden grand gray great green grim handy happy harsh heavy
    hidden hollow humble icy ideal jolly keen kind large late lazy lean light local lonely loud lucky mellow mild
    minor modest narrow neat noble novel odd pale plain polite proud pure quick quiet rapid rare ready rich rigid
    ripe rough round royal rural sharp shiny short shy silent simple sleepy slim slow small smart smooth soft solid
    sour spare steady steep stern still strong sturdy subtle sudden sunny sweet swift tall tame tender thick thin
    tidy tiny tough urban vague valid vast vivid warm weak wild wise witty young
    """)
NOUNS = _listed("""
    acorn actor album anchor apple arrow atlas badge baker basin basket beach bell berry blade boat bottle bridge
    broom brush bucket button cabin cable camel candle canoe canvas carpet castle cedar chair chalk chapel cherry
    circle cliff clock cloud coat comet copper corner cotton cradle crane crown curtain daisy desert desk diamond
    doctor dragon drum eagle engine fabric falcon farmer feather fence ferry field flame flute forest fossil
    fountain garden garlic gate ginger glacier glove goose grain guitar hammer harbor hazel helmet hill honey horse
    island ivory jacket jungle kettle kitchen ladder lake lantern lemon letter lily lizard lobster magnet maple
    marble market meadow melon mirror monkey mountain museum needle nest novel oak ocean olive onion orange orchid
    otter oven owl palace panther paper parrot pebble pencil pepper piano pillow pilot planet plum pocket pond
    potato prairie puzzle rabbit raven ribbon river rocket saddle sailor salmon scarf school shadow shell shovel
    silver spider spoon stable statue stone summer sunset swan table temple tiger tower train tulip tunnel turtle
    valley velvet violin wagon walnut whale willow window winter wolf yacht
    """)


def number(draw: Random) -> str:
    """Returns a random number of seven digits."""
    return str(draw.randint(10**6, 10**7 - 1))


def identifier(draw: Random) -> str:
    """Returns a random UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def pair(draw: Random) -> str:
    """Returns an adjective and a noun; one in eight has a second adjective, which allows millions of combinations."""
    longer = [draw.choice(ADJECTIVES)] * (draw.random() < 0.125)
    return "-".join([*longer, draw.choice(ADJECTIVES), draw.choice(NOUNS)])


def letters(draw: Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """Returns a string of random letters."""
    return "".join(draw.choices(alphabet, k=count))


def distinct(draw: Random, make: Callable[[Random], str], count: int) -> list[str]:
    """Returns `count` different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(draw)] = None
    return list(found)
