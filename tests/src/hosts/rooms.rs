//! Hosts on which one types what a page says: a root directory, a boot ID and a network each.
//!
//! Their programs and files are this machine's, but for `/etc`, which is a copy, and `/var/lib`, `/run`
//! and `/harbour`, which are empty at first. `harbour` is the one under test. Two programs are stood
//! in for: `sudo`, which only runs the rest of the line, and `scp`, which copies between the roots.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::Result;

use super::{Hosts, Wires, seats};
use crate::cluster::binary;

/// Where programs are looked for.
pub(super) const PATH: &str = "/typed:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Copies to another host as `cp` copies to a directory: whose parent has to be there.
const SCP: &str = "#!/bin/sh\nset -e\n\
    [ $# = 3 ] && [ \"$1\" = -r ] || { echo \"scp: only -r FROM HOST:TO\" >&2; exit 2; }\n\
    exec cp -r \"$2\" \"/rooms/${3%%:*}/${3#*:}\"\n";
const SUDO: &str = "#!/bin/sh\nexec \"$@\"\n";

/// Root directory of a host, as the keel sees it.
pub(super) fn root(name: &str) -> String {
    format!("/run/rooms/{name}")
}

impl Hosts {
    /// Hosts of these names with the addresses 192.0.2.1 and so on, and nothing running on them.
    pub fn in_rooms(names: &[&str]) -> Result<Self> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Self::make(names.len(), Wires::Rooms(names))
    }

    pub(super) fn furnish(&self, names: &[String]) -> Result<()> {
        let typed = self.dir().join("typed");
        fs::create_dir(&typed)?;
        for (program, text) in [("sudo", SUDO), ("scp", SCP)] {
            fs::write(typed.join(program), text)?;
            fs::set_permissions(typed.join(program), fs::Permissions::from_mode(0o755))?;
        }
        std::os::unix::fs::symlink(binary(), typed.join("harbour"))?;
        // The roots are there before the namespaces, so that each host reaches the others' `/etc`.
        let mut script = format!("{}mkdir /run/hosts /run/rooms\n", seats::SPLIT);
        for name in names {
            let root = root(name);
            script += &format!("mkdir {root}\nmount -t tmpfs room {root}\n");
        }
        for (host, name) in names.iter().enumerate() {
            let boot_id = self.host_dir(host).join("boot_id");
            fs::write(&boot_id, format!("00000000-0000-4000-8000-{host:012}\n"))?;
            let furnish = self.dir().join(format!("furnish-{name}"));
            let (root, boot_id, typed) = (root(name), boot_id.display(), typed.display());
            fs::write(
                &furnish,
                format!(
                    "for entry in /*; do\n\
                       name=${{entry#/}}\n\
                       case $name in etc | run | harbour | typed | rooms) continue ;; esac\n\
                       if [ -L \"$entry\" ]; then cp -P \"$entry\" {root}/\n\
                       elif [ -d \"$entry\" ]; then mkdir \"{root}/$name\"; mount --rbind \"$entry\" \"{root}/$name\"\n\
                       fi\n\
                     done\n\
                     mkdir {root}/run {root}/typed {root}/rooms\n\
                     cp -a /etc {root}/etc\n\
                     rm -rf {root}/etc/harbour\n\
                     mount -t tmpfs own {root}/var/lib\n\
                     mount --bind {typed} {root}/typed\n\
                     mount --rbind /run/rooms {root}/rooms\n\
                     mount --bind {boot_id} {root}/proc/sys/kernel/random/boot_id\n"
                ),
            )?;
            let namespace = seats::namespace(host);
            script += &format!(
                "touch {namespace}\nsplit {namespace} sh -e {}\n",
                furnish.display()
            );
        }
        self.keel_script(&script)
    }
}
