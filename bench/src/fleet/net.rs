//! Hosts as network namespaces on one bridge, the registry's behind a slow cable.

use std::{net::Ipv4Addr, path::Path, process::Command};

use anyhow::Context as _;

use crate::command;

/// Who has the registry.
pub(super) const REGISTRY: usize = 0;
/// Who has metad, the donor, and so the pool.
pub(super) const POOL: usize = 1;
/// The first of the others.
pub(crate) const FIRST: usize = 2;
/// Rate of the registry's cable, in Mbit/s.
const RATE_MBIT: u32 = 400;

/// The bridge with all cables in. It ends with the sandbox.
pub(super) struct Net;

impl Net {
    /// Lays cables to the registry, the pool, and so many more.
    pub(super) fn lay(others: usize) -> anyhow::Result<Self> {
        // Names of namespaces live under /run: there is one of the sandbox's own.
        let mut script = String::from(
            "mount -t tmpfs run /run\nmkdir /run/netns\n\
             ip link add sw type bridge forward_delay 0\nip link set sw up\n",
        );
        for host in 0..FIRST + others {
            let address = address(host);
            script += &format!(
                "ip netns add h{host}\n\
                 ip link add p{host} type veth peer name eth0 netns h{host}\n\
                 ip link set p{host} master sw up\n\
                 ip -n h{host} link set lo up\n\
                 ip -n h{host} addr add {address}/24 dev eth0\n\
                 ip -n h{host} link set eth0 up\n"
            );
        }
        // What the registry sends is what is limited; what it is asked is nothing beside it.
        script += &format!(
            "ip netns exec h{REGISTRY} tc qdisc add dev eth0 root \
             tbf rate {RATE_MBIT}mbit burst 512kb latency 100ms\n"
        );
        command::run(Command::new("sh").args(["-ec", &script])).context("cannot lay cables")?;
        Ok(Self)
    }

    /// A program on a host.
    pub(super) fn on(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/h{host}")).arg("--");
        command.arg(program);
        command
    }

    /// Bytes that have left the registry's host, with all headers.
    pub(super) fn sent(&self) -> anyhow::Result<u64> {
        let mut list = self.on(REGISTRY, Path::new("cat"));
        let text = String::from_utf8(command::run(list.arg("/proc/net/dev"))?)?;
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"));
        // Eight figures on what was received come first (proc_pid_net(5)).
        let sent = line.and_then(|line| line.split_whitespace().nth(8));
        sent.context("the registry has no interface")?
            .parse()
            .context("an interface counts in no number")
    }
}

/// A host's address.
pub(super) fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, u8::try_from(host + 1).unwrap_or(u8::MAX))
}
