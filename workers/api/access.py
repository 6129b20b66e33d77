"""Authentication by key, a request's tenant, and the cache salt that limits sharing of cached prefixes."""

from __future__ import annotations

import hashlib
import hmac

from aiohttp import web

from pipeline.config import ApiConfig, ApiKey
from pipeline.wire.errors import RequestError
from workers.api.operations import ADMIN_ROUTES, LANES, METRICS, OPEN_ROUTES
from workers.api.page.routes import is_page
from workers.api.tenants import peer_tenant


class Access:
    def __init__(self, config: ApiConfig) -> None:
        self._keys, self._admin_key = config.keys, config.admin_key
        self._serves_page = not config.disable_page
        self._trusts_forwarded_for = config.trust_forwarded_for

    def admit(self, request: web.Request) -> None:
        """Raises RequestError for a request without the key that its path needs."""
        if request.path.startswith(ADMIN_ROUTES):
            if not self.is_admin(request):
                raise RequestError("the admin key is needed: Authorization: Bearer KEY", status=401)
        elif self._keys and not self._is_open(request) and self._key_of(request) is None:
            what = "Incorrect API key provided" if _given_key(request) else "an API key is needed"
            raise RequestError(f"{what}: send a valid one, as Authorization: Bearer KEY", status=401)

    def _is_open(self, request: web.Request) -> bool:
        if request.path in OPEN_ROUTES or (self._serves_page and is_page(request.path)):
            return True
        return request.path in (METRICS, LANES) and self.is_admin(request)

    def is_admin(self, request: web.Request) -> bool:
        has_key = bool(self._admin_key)
        return has_key and hmac.compare_digest(_given_key(request), self._admin_key.encode())

    def may_see(self, request: web.Request, name: str) -> bool:
        """Whether a reader of the metrics sees what the keys of this name have asked for."""
        return self.is_admin(request) or (bool(name) and name == self.key_name(request))

    @property
    def has_admin(self) -> bool:
        return bool(self._admin_key)

    def sees_all(self, request: web.Request) -> bool:
        """Whether it may see the ids of all requests, whoever has asked."""
        return not self._keys or self.is_admin(request)

    def key_name(self, request: web.Request) -> str:
        """Empty without a valid key."""
        key = self._key_of(request)
        return "" if key is None else key.name

    def tenant(self, request: web.Request) -> str:
        """The request's tenant: the name of its key, else the address that it comes from."""
        key = self._key_of(request)
        if key is not None:
            return f"key:{key.name}"
        forwarded = request.headers.getall("X-Forwarded-For", []) if self._trusts_forwarded_for else []
        return peer_tenant(request.remote, forwarded)

    def cache_salt(self, request: web.Request, salt: str) -> bytes:
        """Requests share cached prefixes if they have the same key name and the same salt.

        The digest includes the first key of that name, so that it cannot be guessed from the name.
        """
        if not self._keys and not salt:
            return b""
        key = self._key_of(request)
        first = next((other for other in self._keys if key and other.name == key.name), None)
        owner = hashlib.sha256(f"{first.name}:{first.key}".encode() if first else b"").digest()
        return hashlib.sha256(owner + salt.encode("utf-8", "surrogatepass")).digest()

    def _key_of(self, request: web.Request) -> ApiKey | None:
        """The given key's entry. All keys are compared, so that the time taken reveals nothing."""
        given = _given_key(request)
        fits = [hmac.compare_digest(given, key.key.encode()) for key in self._keys]
        return next((key for key, does_fit in zip(self._keys, fits, strict=True) if does_fit), None)


def _given_key(request: web.Request) -> bytes:
    """The key of `Authorization: Bearer KEY`, else of `X-Api-Key`, as Anthropic's clients send it; empty if
    missing. The scheme ignores case (RFC 9110)."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else ""
    return (given or request.headers.get("X-Api-Key", "").strip()).encode("utf-8", "surrogateescape")
