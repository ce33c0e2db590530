"""How the server's port is protected, from its settings: TLS, client certificates, tokens; and what may not be combined."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.transport.certificates import CertificateError, Certificates
from lossgrad_server.transport.tokens import TokenFileError, Tokens


@dataclass(frozen=True, slots=True)
class Security:
    """What protects a port. No `certificates`: no TLS. No `tokens`: whoever reaches it may call."""

    certificates: Certificates | None = None
    tokens: Tokens | None = None

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Bind an address; return the port. Raises RuntimeError where it cannot be had."""
        if self.certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.certificates.server_credentials())


def security(config: ServerConfig) -> Security:
    """Read the files that the settings name. Raises ConfigError where they, or the settings together, cannot be used."""
    has_tls = bool(config.tls_cert or config.tls_key)
    if has_tls and not (config.tls_cert and config.tls_key):
        given, missing = ("--tls-cert", "--tls-key") if config.tls_cert else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{given} is given without {missing}; TLS needs both")
    if config.tls_client_ca and not has_tls:
        raise ConfigError("--tls-client-ca is given without --tls-cert and --tls-key; client certificates need TLS")
    if not has_tls and not config.insecure and not is_local(config):
        raise ConfigError(
            f"--host is {config.host}, which others can reach, and nothing would be encrypted; give --tls-cert and "
            "--tls-key, or --insecure if the network between you and your callers is yours alone"
        )
    if config.token_file and not has_tls and not is_local(config):
        raise ConfigError(
            f"--token-file is given, --host is {config.host}, which others can reach, and there is no TLS: tokens would "
            "travel in plaintext; give --tls-cert and --tls-key, or let what ends TLS for you reach this server on the "
            "loopback or a unix socket"
        )
    try:
        certificates = None
        if has_tls:
            authorities = Path(config.tls_client_ca) if config.tls_client_ca else None
            certificates = Certificates(Path(config.tls_cert), Path(config.tls_key), authorities)
        tokens = Tokens(Path(config.token_file)) if config.token_file else None
    except (CertificateError, TokenFileError) as error:
        raise ConfigError(str(error)) from None
    return Security(certificates, tokens)


def is_local(config: ServerConfig) -> bool:
    """Return whether only this machine can reach the server: a loopback address or a unix socket."""
    if config.is_socket or config.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(config.host.strip("[]")).is_loopback
    except ValueError:
        return False
