//! Cables between hosts: what `ip` and `tc` do to them.

use anyhow::Result;

use super::{COMMAND_LIMIT, Hosts};
use crate::shell;

impl Hosts {
    /// A bridge, and from it a cable to a namespace for each host.
    pub(super) fn lay_cables(&self) -> Result<()> {
        let mut script = String::from(
            "ip link set lo up\nip link add sw type bridge forward_delay 0\nip link set sw up\n",
        );
        for host in 0..self.count {
            let number = host + 1;
            script += &format!(
                "ip netns add h{host}\n\
                 ip link add p{host} type veth peer name eth0 netns h{host}\n\
                 ip link set p{host} master sw up\n\
                 ip -n h{host} link set lo up\n\
                 ip -n h{host} addr add 10.77.0.{number}/24 dev eth0\n\
                 ip -n h{host} addr add 192.0.2.{number}/24 dev eth0\n\
                 ip -n h{host} addr add fd77::{number:x}/64 dev eth0 nodad\n\
                 ip -n h{host} link set eth0 up\n"
            );
        }
        self.keel_script(&script)
    }

    /// Pulls a host's cable out, or puts it in again.
    pub fn plug(&self, host: usize, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.keel_script(&format!("ip link set p{host} {state}\n"))
    }

    /// Makes a host's cable slow: so many Mbit a second, both ways. A token bucket, which kernels have
    /// that were built without delay and loss (netem).
    pub fn slow_down(&self, host: usize, rate_mbit: u32) -> Result<()> {
        let bucket = format!("root tbf rate {rate_mbit}mbit burst 64kb latency 50ms");
        self.keel_script(&format!(
            "tc qdisc replace dev p{host} {bucket}\nip netns exec h{host} tc qdisc replace dev eth0 {bucket}\n"
        ))
    }

    /// Makes a host's cable as fast as it was.
    pub fn speed_up(&self, host: usize) -> Result<()> {
        self.keel_script(&format!(
            "tc qdisc del dev p{host} root 2>/dev/null || true\n\
             ip netns exec h{host} tc qdisc del dev eth0 root 2>/dev/null || true\n"
        ))
    }

    pub(super) fn keel_script(&self, script: &str) -> Result<()> {
        let path = "PATH=$PATH:/usr/sbin:/sbin\n";
        let mut command = self.in_keel("sh");
        shell::run(
            command.args(["-ec", &format!("{path}{script}")]),
            COMMAND_LIMIT,
        )?
        .ok()?;
        Ok(())
    }
}
