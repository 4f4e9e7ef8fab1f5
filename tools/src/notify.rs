//! Telling systemd that a service serves.

use std::os::{
    linux::net::SocketAddrExt as _,
    unix::net::{SocketAddr, UnixDatagram},
};

/// Where systemd listens, in the environment of who is to tell it something.
pub const VARIABLE: &str = "NOTIFY_SOCKET";

/// Says that this process is ready, if systemd wants to know. What goes wrong with that is only logged:
/// systemd has a limit of its own.
pub fn ready() {
    let Some(name) = std::env::var_os(VARIABLE) else {
        return;
    };
    let name = name.into_encoded_bytes();
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(String::from_utf8_lossy(&name).as_ref()),
    };
    let told =
        address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = told {
        tracing::warn!(%error, "systemd cannot be told that this is ready");
    }
}
