"""The endpoint over TLS."""

from __future__ import annotations

import ssl

from pipeline.config.api import ApiConfig


def ssl_context(config: ApiConfig) -> ssl.SSLContext | None:
    """None: plain HTTP. Raises ValueError, naming the file, for one that cannot be used."""
    if not config.ssl_certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The empty password keeps OpenSSL from asking for one at the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile or None, password=lambda: "")
    except (OSError, ValueError) as error:
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise ValueError(f"ssl_certfile, ssl_keyfile: {files} cannot be used: {_reason(error)}") from None
    if config.ssl_ca_certs:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            what = f"ssl_ca_certs: {config.ssl_ca_certs} cannot be used: {_reason(error)}"
            raise ValueError(what) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
