"""
URLs that lead where nobody is to be led, each with what is said of it. A corpus, not a test.

Two lists. ``PLACES`` x ``SPELLINGS``: addresses inside some house, one of each kind there is, in every way an address
can be written. And ``TEXTS``: single ideas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from urllib.parse import quote

NOT_PUBLIC: Final = "address is not public"
DISGUISED: Final = "refused: its host is an address that is not spelt as one"
NO_HOST: Final = "refused: it has no host"
BAD_HOST: Final = "refused: its host or port is not valid"
SCHEME: Final = "refused: its scheme is not one of http, https"
CHAIN: Final = "refused: it is a chain; spell a literal :: as %3A%3A"
CREDENTIALS: Final = "refused: it carries credentials"
CONTROL: Final = "refused: it contains control characters"
NO_NAME: Final = "its host name does not resolve"


@dataclass(frozen=True)
class Hostile:
    """*idea* is unique; *refusal* is what a consumer is told, and nothing else."""

    idea: str
    url: str
    refusal: str

    def __str__(self) -> str:
        return self.idea


PLACES: Final[Mapping[str, str]] = {
    "this network": "0.0.0.0",
    "a host of this network": "0.1.2.3",
    "loopback": "127.0.0.1",
    "the last of loopback": "127.255.255.254",
    "private 10": "10.0.0.1",
    "private 172, first": "172.16.0.1",
    "private 172, last": "172.31.255.254",
    "private 192": "192.168.1.1",
    "shared by providers": "100.64.0.1",
    "Alibaba's metadata": "100.100.100.200",
    "link-local": "169.254.1.1",
    "metadata of most clouds": "169.254.169.254",
    "credentials of a task of AWS": "169.254.170.2",
    "Azure's machine agent": "168.63.129.16",
    "Oracle's metadata": "192.0.0.192",
    "protocol assignments": "192.0.0.8",
    "documentation 1": "192.0.2.1",
    "documentation 2": "198.51.100.1",
    "documentation 3": "203.0.113.1",
    "6to4 relays": "192.88.99.1",
    "benchmarking": "198.19.255.254",
    "multicast, this link": "224.0.0.1",
    "multicast, this organisation": "239.255.255.250",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
}


def _parts(address: str) -> tuple[int, int, int, int]:
    one, two, three, four = IPv4Address(address).packed
    return one, two, three, four


def _of(form: str) -> Callable[[str], str]:
    return lambda address: ".".join(format(part, form) for part in _parts(address))


def _hex_pairs(address: str) -> str:
    one, two, three, four = _parts(address)
    return f"{one:02x}{two:02x}:{three:02x}{four:02x}"


def _short(address: str) -> str:
    one, *rest = _parts(address)
    return f"{one}.{int.from_bytes(rest)}"


def _shorter(address: str) -> str:
    one, two, *rest = _parts(address)
    return f"{one}.{two}.{int.from_bytes(rest)}"


def _digits(zero: str) -> Callable[[str], str]:
    return lambda address: address.translate({ord("0") + n: chr(ord(zero) + n) for n in range(10)})


def _circled(address: str) -> str:
    return address.translate({ord("0"): "\u24ea", **{ord("0") + n: chr(0x2460 + n - 1) for n in range(1, 10)}})


def _inside(prefix: str) -> Callable[[str], str]:
    return lambda address: f"[{prefix}{_hex_pairs(address)}]"


def _6to4(address: str) -> str:
    return f"[2002:{_hex_pairs(address)}::1]"


def _teredo(address: str) -> str:
    # The client's address stands in it with every bit turned.
    hidden = int(IPv4Address(address)) ^ 0xFFFF_FFFF
    return f"[{IPv6Address((0x20010000 << 96) | (0x41424344 << 64) | hidden)}]"


SPELLINGS: Final[Mapping[str, tuple[Callable[[str], str], str]]] = {
    "as it is": (str, NOT_PUBLIC),
    "as one number": (lambda address: str(int(IPv4Address(address))), DISGUISED),
    "as one hexadecimal number": (lambda address: hex(int(IPv4Address(address))), DISGUISED),
    "as one octal number": (lambda address: f"0{int(IPv4Address(address)):o}", DISGUISED),
    "in two parts": (_short, DISGUISED),
    "in three parts": (_shorter, DISGUISED),
    "in octal": (_of("04o"), DISGUISED),
    "in hexadecimal": (_of("#x"), DISGUISED),
    "with leading zeros": (lambda address: ".".join(f"0{part}" for part in _parts(address)), DISGUISED),
    "with a dot at its end": (lambda address: f"{address}.", DISGUISED),
    "in wide digits": (_digits("\uff10"), DISGUISED),
    "in bold digits": (_digits("\U0001d7ce"), DISGUISED),
    "in circles": (_circled, DISGUISED),
    "with ideographic dots": (lambda address: address.replace(".", "\u3002"), DISGUISED),
    "escaped": (lambda address: "".join(f"%{ord(each):02X}" for each in address), BAD_HOST),
    "mapped into IPv6": (_inside("::ffff:"), NOT_PUBLIC),
    "mapped into IPv6, with dots": (lambda address: f"[::FFFF:{address}]", NOT_PUBLIC),
    "mapped into IPv6, in full": (_inside("0000:0000:0000:0000:0000:ffff:"), NOT_PUBLIC),
    "compatible with IPv6": (_inside("0:0:0:0:0:0:"), NOT_PUBLIC),
    "translated": (_inside("::ffff:0:"), NOT_PUBLIC),
    "behind NAT64": (_inside("64:ff9b::"), NOT_PUBLIC),
    "behind a NAT64 of the house": (_inside("64:ff9b:1::"), NOT_PUBLIC),
    "behind 6to4": (_6to4, NOT_PUBLIC),
    "behind Teredo": (_teredo, NOT_PUBLIC),
}

IPV6: Final[Mapping[str, str]] = {
    "nothing": "::",
    "loopback": "::1",
    "loopback in full": "0:0:0:0:0:0:0:1",
    "link-local": "fe80::1",
    "the end of link-local": "febf:ffff::1",
    "site-local": "fec0::1",
    "unique local, to come": "fc00::1",
    "unique local": "fd12:3456:789a::1",
    "AWS' metadata": "fd00:ec2::254",
    "Google's metadata": "fd20:ce::254",
    "multicast, this machine": "ff01::1",
    "multicast, this link": "ff02::fb",
    "multicast, the world": "ff0e::1",
    "documentation": "2001:db8::1",
    "documentation, the new block": "3fff::1",
    "ORCHID": "2001:10::1",
    "benchmarking": "2001:2::1",
    "protocol assignments": "2001:100::1",
    "discarded": "100::1",
    "segments": "5f00::1",
    "never given out": "4000::1",
    "NAT64 of loopback, in upper case": "64:FF9B::7F00:1",
}

_NAMES: Final[Mapping[str, str]] = {
    "by name": "localhost",
    "by name, in capitals": "LOCALHOST",
    "by name, in mixed case": "LocalHost",
    "by name, in circles": "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3",
    "by name, in wide letters": "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54",
    "by name, in script letters": "\U0001d4c1\U0001d45c\U0001d4b8\U0001d4b6\U0001d4c1host",
    "by name, with a long s": "localho\u017ft",
}

_SCHEMES: Final = (
    *("file", "ftp", "ftps", "sftp", "ssh", "scp", "gopher", "dict", "ldap", "ldaps", "tftp", "smb", "cifs", "nfs"),
    *("telnet", "imap", "pop3", "smtp", "rtsp", "mailto", "news", "nntp", "jar", "netdoc", "php", "phar", "expect"),
    *("data", "javascript", "blob", "about", "view-source", "ws", "wss", "h2c", "unix", "http+unix", "docker", "npipe"),
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "hdfs", "webhdfs", "git", "github", "hf", "dropbox", "memory"),
    *(
        "local",
        "root",
        "arrow_hdfs",
        "jlab",
        "libarchive",
        "oci",
        "ipfs",
        "ipns",
        "magnet",
        "xn--http",
        "https+insecure",
    ),
)

_CHAINS: Final = (
    *("simplecache", "filecache", "blockcache", "cached", "zip", "tar", "reference", "dir", "dask", "libarchive"),
    *("lakefs", "kerchunk", "asyncwrapper", "generic", "blob"),
)

_TEXTS: Final = (
    ("nothing", "", SCHEME),
    ("only spaces", "   ", SCHEME),
    ("a path", "/etc/passwd", SCHEME),
    ("a relative path", "../../etc/passwd", SCHEME),
    ("no scheme", "//127.0.0.1/x", SCHEME),
    ("no scheme, with a port", "127.0.0.1:80/x", SCHEME),
    ("a name for a scheme", "localhost:80", SCHEME),
    ("a path of Windows", "C:\\Windows\\win.ini", SCHEME),
    ("a share of Windows", "\\\\127.0.0.1\\share", SCHEME),
    ("a look-alike of http", "h\u0442\u0442p://127.0.0.1/", SCHEME),
    ("wide letters for http", "\uff48\uff54\uff54\uff50://127.0.0.1/", SCHEME),
    ("a scheme before the scheme", "url:http://127.0.0.1/", SCHEME),
    ("a scheme with a space", "http ://127.0.0.1/", SCHEME),
    ("an escaped scheme", "%68ttp://127.0.0.1/", SCHEME),
    ("an escaped colon", "http%3A//127.0.0.1/", SCHEME),
    ("only a scheme", "http:", NO_HOST),
    ("a scheme and slashes", "http://", NO_HOST),
    ("three slashes", "http:///127.0.0.1/x", NO_HOST),
    ("one slash", "http:/127.0.0.1/x", NO_HOST),
    ("no slash", "http:127.0.0.1/x", NO_HOST),
    ("backslashes for slashes", "http:\\\\127.0.0.1\\x", NO_HOST),
    ("a slash and a backslash", "http:/\\127.0.0.1/x", NO_HOST),
    ("only a port", "http://:80/x", NO_HOST),
    ("a query for a host", "http://?127.0.0.1/", NO_HOST),
    ("a fragment for a host", "http://#127.0.0.1/", NO_HOST),
    ("a user", "http://me@127.0.0.1/", CREDENTIALS),
    ("a user and a password", "http://me:hush@127.0.0.1/", CREDENTIALS),
    ("a host for a user", "http://example.com@127.0.0.1/", CREDENTIALS),
    ("a host and port for a user", "http://example.com:80@127.0.0.1:80/", CREDENTIALS),
    ("an empty user", "http://@127.0.0.1/", CREDENTIALS),
    ("an empty user and password", "http://:@127.0.0.1/", CREDENTIALS),
    ("two users", "http://a@b@127.0.0.1/", CREDENTIALS),
    ("a user with a backslash", "http://example.com\\@127.0.0.1/", CREDENTIALS),
    ("a user with an escaped slash", "http://example.com%2F@127.0.0.1/", CREDENTIALS),
    ("a user with an escaped fragment", "http://example.com%23@127.0.0.1/", CREDENTIALS),
    ("a user that ends in a bracket", "http://[::1]@127.0.0.1/", CREDENTIALS),
    ("a user in the scheme's case", "HTTPS://Me@LOCALHOST/", CREDENTIALS),
    ("an escaped at", "http://example.com%40127.0.0.1/", DISGUISED),
    ("a wide at", "http://example.com\uff20127.0.0.1/", BAD_HOST),
    ("a small at", "http://example.com\ufe6b127.0.0.1/", BAD_HOST),
    ("a backslash in a host", "http://127.0.0.1\\.example.com/", BAD_HOST),
    ("a backslash after a host", "http://127.0.0.1\\", BAD_HOST),
    ("a wide backslash", "http://example.com\uff3c127.0.0.1/", BAD_HOST),
    ("a wide slash", "http://127.0.0.1\uff0f.example.com/", BAD_HOST),
    ("a wide question mark", "http://127.0.0.1\uff1f.example.com/", BAD_HOST),
    ("a wide number sign", "http://127.0.0.1\uff03.example.com/", BAD_HOST),
    ("a wide colon", "http://127.0.0.1\uff1a80/", BAD_HOST),
    ("account of", "http://127.0.0.1\u2100.example.com/", BAD_HOST),
    ("a space in a host", "http://127.0.0.1 .example.com/", BAD_HOST),
    ("a space that does not break", "http://127.0.0.1\u00a0.example.com/", BAD_HOST),
    ("an ideographic space", "http://127.0.0.1\u3000.example.com/", BAD_HOST),
    ("an escaped zero", "http://127.0.0.1%00.example.com/", BAD_HOST),
    ("an escaped line end", "http://127.0.0.1%0d%0a.example.com/", BAD_HOST),
    ("an escaped slash", "http://127.0.0.1%2f.example.com/", BAD_HOST),
    ("an escaped dot", "http://127%2e0%2e0%2e1/", BAD_HOST),
    ("escaped twice", "http://%2531%2532%2537.0.0.1/", DISGUISED),
    ("escaped wide digits", "http://%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1/", DISGUISED),
    ("half an escape", "http://127.0.0.1%/", BAD_HOST),
    ("an escaped name", f"http://{quote('localhost', safe='').replace('l', '%6c')}/", BAD_HOST),
    ("an empty label", "http://localhost..example.com/", BAD_HOST),
    ("a dot at the beginning", "http://.127.0.0.1/", DISGUISED),
    ("only a dot", "http://./", BAD_HOST),
    ("only dots", "http://.../", BAD_HOST),
    ("two dots at the end", "http://127.0.0.1../", DISGUISED),
    ("a label that is too long", f"http://{'a' * 64}.example.com/", BAD_HOST),
    ("a name that is too long", f"http://{'a.' * 127}example.com/", BAD_HOST),
    ("Unicode that becomes too long", "http://" + 63 * "\u00fc" + ".example.com/", BAD_HOST),
    ("a broken punycode", "http://xn--\u00fc.example.com/", BAD_HOST),
    ("Unicode from right to left", "http://\u202e1.0.0.721/", BAD_HOST),
    ("half a character", "http://\ud800.example.com/", BAD_HOST),
    ("a comma", "http://127.0.0.1,example.com/", BAD_HOST),
    ("a semicolon", "http://127.0.0.1;example.com/", BAD_HOST),
    ("a dollar", "http://127.0.0.1$.example.com/", BAD_HOST),
    ("an angle", "http://<127.0.0.1>/", BAD_HOST),
    ("a quote", 'http://"127.0.0.1"/', BAD_HOST),
    ("braces", "http://{127.0.0.1}/", BAD_HOST),
    ("a pipe", "http://127.0.0.1|example.com/", BAD_HOST),
    ("a caret", "http://127.0.0.1^example.com/", BAD_HOST),
    ("a backtick", "http://`hostname`/", BAD_HOST),
    ("an asterisk", "http://*/", BAD_HOST),
    ("a port out of range", "http://127.0.0.1:65536/", BAD_HOST),
    ("a port that wraps", "http://127.0.0.1:65616/", BAD_HOST),
    ("a negative port", "http://127.0.0.1:-80/", BAD_HOST),
    ("a port with a sign", "http://127.0.0.1:+80/", BAD_HOST),
    ("a port of letters", "http://127.0.0.1:http/", BAD_HOST),
    ("a port in hexadecimal", "http://127.0.0.1:0x50/", BAD_HOST),
    ("a port with an underscore", "http://127.0.0.1:8_0/", BAD_HOST),
    ("a port in Arabic digits", "http://127.0.0.1:\u0668\u0660/", BAD_HOST),
    ("a port in superscript", "http://127.0.0.1:\u2078\u2070/", BAD_HOST),
    ("a port with a space", "http://127.0.0.1: 80/", BAD_HOST),
    ("two ports", "http://127.0.0.1:80:80/", BAD_HOST),
    ("a port and a host", "http://127.0.0.1:80\\example.com/", BAD_HOST),
    ("IPv6 without brackets", "http://fe80:1:2:3:4:5:6:7/", BAD_HOST),
    ("an open bracket", "http://[fe80:1/", BAD_HOST),
    ("a closed bracket", "http://fe80:1]/", BAD_HOST),
    ("brackets around a name", "http://[localhost]/", BAD_HOST),
    ("brackets around IPv4", "http://[127.0.0.1]/", BAD_HOST),
    ("brackets around nothing", "http://[]/", BAD_HOST),
    ("brackets in brackets", "http://[[fe80:1:2:3:4:5:6:7]]/", BAD_HOST),
    ("something before a bracket", "http://x[fe80:1:2:3:4:5:6:7]/", BAD_HOST),
    ("something after a bracket", "http://[fe80:1:2:3:4:5:6:7]x/", BAD_HOST),
    ("an address of the future", "http://[v1.fe80:1]/", BAD_HOST),
    ("nine groups", "http://[1:2:3:4:5:6:7:8:9]/", BAD_HOST),
    ("a group that is too long", "http://[fe80:1:2:3:4:5:6:00007]/", BAD_HOST),
    ("a zone", "http://[fe80:0:0:0:0:0:0:1%eth0]/", BAD_HOST),
    ("an escaped zone", "http://[fe80:0:0:0:0:0:0:1%25eth0]/", BAD_HOST),
    ("a zone by number", "http://[fe80:0:0:0:0:0:0:1%1]/", BAD_HOST),
    ("an empty zone", "http://[fe80:0:0:0:0:0:0:1%]/", BAD_HOST),
    ("a zone of loopback", "http://[0:0:0:0:0:0:0:1%lo]/", BAD_HOST),
    ("a zone that is a path", "http://[fe80:0:0:0:0:0:0:1%25..%2f]/", BAD_HOST),
    ("IPv6 in the digits of another script", "http://[fe80:\u0661:2:3:4:5:6:7]/", BAD_HOST),
    ("IPv6 with a tail that is octal", "http://[0:0:0:0:0:ffff:0177.0.0.1]/", BAD_HOST),
    ("IPv6 with a short tail", "http://[0:0:0:0:0:ffff:127.1]/", BAD_HOST),
    ("a number too large for an address", "http://4294967296/", DISGUISED),
    ("a number that wraps to loopback", "http://6425673729/", DISGUISED),
    ("a part that wraps", "http://127.0.0.257/", DISGUISED),
    ("five parts", "http://127.0.0.0.1/", DISGUISED),
    ("parts of several kinds", "http://0x7f.0.0.01/", DISGUISED),
    ("a capital X", "http://0X7F000001/", DISGUISED),
    ("an empty hexadecimal number", "http://0x/", DISGUISED),
    ("many zeros", "http://00000000000000000000177.0.0.1/", DISGUISED),
    ("a hexadecimal last part", "http://example.0x7f/", DISGUISED),
    ("a name that ends in a number", "http://example.1/", DISGUISED),
    ("a number with a dot", "http://2130706433./", DISGUISED),
    ("an octal digit that is none", "http://0189.0.0.1/", DISGUISED),
    ("superscript digits", "http://\u00b9\u00b2\u2077.\u2070.\u2070.\u00b9/", DISGUISED),
    ("digits in parentheses", "http://\u2474\u2475\u247a.0.0.\u2474/", BAD_HOST),
    ("digits with a full stop", "http://127.0.0\u2488/", DISGUISED),
    ("half-wide dots", "http://127\uff610\uff610\uff611/", DISGUISED),
    ("wide dots", "http://127\uff0e0\uff0e0\uff0e1/", DISGUISED),
    ("dots of one leader", "http://127\u20240\u20240\u20241/", DISGUISED),
    ("a soft hyphen in an address", "http://127.0.\u00ad0.1/", BAD_HOST),
    ("a joiner in an address", "http://127.0.\u20600.1/", BAD_HOST),
    ("what is not seen in a name", "http://local\u00adhost/", BAD_HOST),
    ("nothing in a name", "http://local\u200bhost/", BAD_HOST),
    ("a zero byte", "http://127.0.0.1\0.example.com/", CONTROL),
    ("a line end in a host", "http://127.0.0.1\n.example.com/", CONTROL),
    ("a line end in a path", "http://127.0.0.1/\r\nHost: inside", CONTROL),
    ("a second request", "http://127.0.0.1/ HTTP/1.1\r\n\r\nGET /admin", CONTROL),
    ("a tab in a scheme", "ht\ttp://127.0.0.1/", CONTROL),
    ("a tab in a host", "http://127.0.\t0.1/", CONTROL),
    ("a line end at the end", "http://127.0.0.1/\n", CONTROL),
    ("a control character before it", "\x01http://127.0.0.1/", CONTROL),
    ("a delete", "http://127.0.0.1/\x7f", CONTROL),
    ("a bell", "http://127.0.0.1/\x07", CONTROL),
    ("an escape sequence", "http://127.0.0.1/\x1b[2J", CONTROL),
    ("a control character of Latin-1", "http://127.0.0.1/\x85", CONTROL),
    ("the first of the upper ones", "http://127.0.0.1/\x80", CONTROL),
    ("a vertical tab", "\x0bhttp://127.0.0.1/", CONTROL),
    ("a form feed", "http://127.0.0.1\x0c/", CONTROL),
    ("a chain in a path", "http://127.0.0.1/a::http://127.0.0.1/b", CHAIN),
    ("a chain in a query", "http://127.0.0.1/?x=zip::y", CHAIN),
    ("a chain in a fragment", "http://127.0.0.1/#zip::y", CHAIN),
    ("a chain of three", "simplecache::zip://x::http://127.0.0.1/x.zip", CHAIN),
    ("a chain in capitals", "SimpleCache::http://127.0.0.1/", CHAIN),
    ("a chain that begins with http", "http::http://127.0.0.1/", CHAIN),
    ("only colons", "::", CHAIN),
    ("IPv6 without brackets, shortened", "http://::1/", CHAIN),
    ("IPv6 that is not closed", "http://[::1/", CHAIN),
    ("a chain behind IPv6", "http://[::1]/x::y", CHAIN),
)


def hostile() -> Iterator[Hostile]:
    """All of them."""
    for (place, address), (form, (spell, refusal)) in (
        (place, spelling) for place in PLACES.items() for spelling in SPELLINGS.items()
    ):
        yield Hostile(f"{place}, {form}", f"http://{spell(address)}/", refusal)
    for place, address in IPV6.items():
        yield Hostile(f"IPv6: {place}", f"http://[{address}]/", NOT_PUBLIC)
    for idea, host in _NAMES.items():
        yield Hostile(f"loopback {idea}", f"http://{host}/", NOT_PUBLIC)
    for scheme in _SCHEMES:
        yield Hostile(f"the scheme {scheme}", f"{scheme}://127.0.0.1/x", SCHEME)
        yield Hostile(f"the scheme {scheme} in capitals", f"{scheme.upper()}:///x", SCHEME)
    for link in _CHAINS:
        yield Hostile(f"a chain with {link}", f"{link}::http://127.0.0.1/x", CHAIN)
        yield Hostile(f"{link} with a path in it, before http", f"{link}://x.csv::http://127.0.0.1/x", CHAIN)
    for idea, url, refusal in _TEXTS:
        yield Hostile(idea, url, refusal)


CORPUS: Final = tuple(hostile())
