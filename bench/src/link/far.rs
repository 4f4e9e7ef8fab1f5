//! The far side of the link: a donor, bare round trips, iperf3's server.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
};

use anyhow::Context as _;
use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
};

use super::{ASKED, FAR, LENT_BYTES, Ready, ip};
use crate::command;

/// Bytes of a reply with 4 KiB of data.
pub(super) const ANSWERED: usize = 24 + super::SHORT;

/// Serves until the end of standard input.
pub(crate) fn run() -> anyhow::Result<()> {
    command::say("here\n")?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    ip(&["addr", "add", &format!("{FAR}/24"), "dev", "far"])?;
    ip(&["link", "set", "far", "up"])?;
    ip(&["link", "set", "lo", "up"])?;
    let dir = tempfile::tempdir()?;
    let mut config = DonorConfig::new("far", dir.path().join("donor"), LENT_BYTES);
    config.huge = HugePages::Never;
    // One region, so that an offset alone says where a byte is.
    config.regions = vec![LENT_BYTES];
    config.listen = vec![SocketAddr::new(FAR, 0)];
    let donor = DonorServer::start(config)?;
    let echo = TcpListener::bind(SocketAddr::new(FAR, 0))?;
    let key = *donor.keys().first().context("the donor lends nothing")?;
    let token = |token: Option<harbour_pool::token::Token>| Some(token?.0);
    let ready = Ready {
        donor: *donor
            .listening()
            .first()
            .context("the donor does not listen")?,
        echo: echo.local_addr()?,
        tokens: [
            token(key.read).context("no token")?,
            token(key.write).context("no token")?,
        ],
    };
    thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    let iperf = Command::new("iperf3")
        .arg("--server")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    command::say(&format!("{}\n", serde_json::to_string(&ready)?))?;
    std::io::stdin().read_line(&mut line)?;
    if let Ok(mut iperf) = iperf {
        iperf.kill()?;
        iperf.wait()?;
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut asked = [0; ASKED];
    loop {
        stream.read_exact(&mut asked)?;
        stream.write_all(&[2; ANSWERED])?;
    }
}
