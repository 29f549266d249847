//! What happened, for people and as JSON.

use std::{collections::BTreeMap, fmt, net::SocketAddr};

use anyhow::Result;
use serde::Serialize;

use super::traffic::Sent;
use crate::{client::Mode, daemon::Daemon, member::Site, sink::Arrival, verify::Balance};

/// Everything.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Nothing lost, altered or doubled, and each plane did its part.
    pub(super) ok: bool,
    /// One per virtual server and way of using it.
    rows: Vec<Row>,
    /// The member that died.
    mishap: Mishap,
    /// Packets that the kernel plane forwarded, both directions.
    kernel_packets: u64,
    /// Connections that the kernel plane carried.
    kernel_flows: u64,
    /// Sessions that the proxy plane carried.
    proxy_sessions: u64,
    /// Where the packet programs sit.
    hooks: BTreeMap<String, String>,
    /// Messages that arrived, by member.
    members: BTreeMap<String, usize>,
    /// Sent against arrived.
    balance: Balance,
}

/// A way of sending mail through the box.
#[derive(Debug, Serialize)]
struct Row {
    virtual_server: String,
    address: SocketAddr,
    plane: String,
    clients: Vec<String>,
    /// What clients saw: TLS version and whose certificate.
    client_tls: String,
    /// What members saw.
    member_tls: String,
    messages: usize,
    arrived: usize,
    members: BTreeMap<String, usize>,
}

/// What befell a member.
#[derive(Debug, Serialize)]
pub(super) struct Mishap {
    /// Which one.
    pub(super) member: String,
    /// How many messages had been sent by then.
    pub(super) died_after: usize,
    /// Until the box took it out.
    pub(super) seen_down_ms: u64,
    /// From its return until the box took it in again.
    pub(super) seen_up_ms: u64,
}

impl Report {
    /// Puts together what clients, members and the daemon say.
    ///
    /// # Errors
    /// When the daemon or a member's records cannot be read.
    pub(super) fn new(
        site: &Site,
        daemon: &Daemon<'_>,
        sent: &[Sent],
        mishap: Mishap,
    ) -> Result<Self> {
        let arrivals = site.arrivals()?;
        let status = daemon.status()?;
        let outcomes: Vec<_> = sent.iter().map(|sent| sent.outcome.clone()).collect();
        let balance = Balance::of(&outcomes, &arrivals);

        let mut rows = Vec::new();
        for server in &status.virtual_servers {
            for mode in [Mode::Implicit, Mode::Starttls, Mode::Plain] {
                let sent: Vec<&Sent> = sent
                    .iter()
                    .filter(|sent| sent.server.to_string() == server.address && sent.mode == mode)
                    .collect();
                if !sent.is_empty() {
                    rows.push(Row::new(
                        &server.name,
                        &server.forward,
                        &sent,
                        &arrivals,
                        site,
                    ));
                }
            }
        }
        let mut kernel_packets = 0;
        let mut kernel_flows = 0;
        let mut proxy_sessions = 0;
        for server in &status.virtual_servers {
            if server.forward == "passthrough" {
                kernel_packets += server.traffic.packets_in + server.traffic.packets_out;
                kernel_flows += server.traffic.total;
            } else {
                proxy_sessions += server.traffic.total;
            }
        }
        let mut members: BTreeMap<String, usize> = site
            .members
            .iter()
            .map(|member| (member.name.clone(), 0))
            .collect();
        for arrival in &arrivals {
            *members.entry(arrival.member.clone()).or_default() += 1;
        }
        Ok(Self {
            ok: balance.is_even()
                && kernel_packets > 0
                && proxy_sessions > 0
                && members.values().all(|count| *count > 0),
            rows,
            mishap,
            kernel_packets,
            kernel_flows,
            proxy_sessions,
            hooks: status
                .kernel
                .attachments
                .into_iter()
                .map(|attachment| (attachment.interface, attachment.hook))
                .collect(),
            members,
            balance,
        })
    }
}

impl Row {
    fn new(name: &str, plane: &str, sent: &[&Sent], arrivals: &[Arrival], site: &Site) -> Self {
        let ids: BTreeMap<&str, &Sent> = sent
            .iter()
            .map(|sent| (sent.outcome.id.as_str(), *sent))
            .collect();
        let own: Vec<&Arrival> = arrivals
            .iter()
            .filter(|arrival| arrival.id.as_deref().is_some_and(|id| ids.contains_key(id)))
            .collect();
        let mut members = BTreeMap::new();
        for arrival in &own {
            *members.entry(arrival.member.clone()).or_default() += 1;
        }
        let mut clients: Vec<String> = sent
            .iter()
            .map(|sent| format!("{} {}", sent.client, sent.program))
            .collect();
        clients.sort_unstable();
        clients.dedup();
        Self {
            virtual_server: name.to_owned(),
            address: sent[0].server,
            plane: if plane == "passthrough" {
                "kernel"
            } else {
                "proxy"
            }
            .to_owned(),
            clients,
            client_tls: all_of(sent.iter().map(|sent| seen_by_client(sent, site))),
            member_tls: all_of(own.iter().map(|arrival| {
                arrival
                    .tls
                    .clone()
                    .unwrap_or_else(|| "plaintext".to_owned())
            })),
            messages: sent.len(),
            arrived: own.len(),
            members,
        }
    }
}

fn seen_by_client(sent: &Sent, site: &Site) -> String {
    let Some(version) = &sent.outcome.tls else {
        return "plaintext".to_owned();
    };
    match &sent.outcome.certificate {
        // Which member it was differs from message to message; that it was the member's own is the point.
        Some(shown) if site.owner_of(shown).is_some() => {
            format!("{version}, the member's certificate")
        }
        Some(_) => format!("{version}, the box's certificate"),
        // Programs that do not tell have verified it against the authority all the same.
        None => version.clone(),
    }
}

/// The different words, the longest alone where it says what the others say and more.
fn all_of(words: impl Iterator<Item = String>) -> String {
    let mut words: Vec<String> = words.collect();
    words.sort_unstable();
    words.dedup();
    let all = words.clone();
    words.retain(|word| {
        !all.iter()
            .any(|other| other.len() > word.len() && other.starts_with(word.as_str()))
    });
    if words.is_empty() {
        return "-".to_owned();
    }
    words.join("; ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&String> = self.members.keys().collect();
        let mut lines = vec![
            [
                "virtual server",
                "address",
                "plane",
                "TLS seen by the client",
                "by the member",
                "sent",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        lines[0].extend(names.iter().map(|name| (*name).clone()));
        for row in &self.rows {
            let mut line = vec![
                row.virtual_server.clone(),
                row.address.to_string(),
                row.plane.clone(),
                row.client_tls.clone(),
                row.member_tls.clone(),
                row.messages.to_string(),
            ];
            line.extend(
                names
                    .iter()
                    .map(|name| row.members.get(*name).copied().unwrap_or(0).to_string()),
            );
            lines.push(line);
        }
        writeln!(f)?;
        table(f, &lines)?;
        writeln!(f)?;
        let hooks: Vec<String> = self
            .hooks
            .iter()
            .map(|(name, hook)| format!("{hook} on {name}"))
            .collect();
        writeln!(
            f,
            "kernel plane  {} packets of {} connections, {}",
            self.kernel_packets,
            self.kernel_flows,
            hooks.join(", ")
        )?;
        writeln!(f, "proxy plane   {} sessions", self.proxy_sessions)?;
        writeln!(
            f,
            "mishap        {} was killed after {} messages, out after {} ms, back in {} ms after its return;",
            self.mishap.member,
            self.mishap.died_after,
            self.mishap.seen_down_ms,
            self.mishap.seen_up_ms
        )?;
        writeln!(
            f,
            "              {} messages were tried again, as mail servers do",
            self.balance.resent
        )?;
        let verdict = if self.ok { "OK" } else { "FAILED" };
        writeln!(f, "{verdict}: {}", self.balance)
    }
}

/// Columns as wide as their widest cell, numbers to the right.
fn table(f: &mut fmt::Formatter<'_>, lines: &[Vec<String>]) -> fmt::Result {
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].len())
                .max()
                .unwrap_or(0)
        })
        .collect();
    for (at, line) in lines.iter().enumerate() {
        let mut text = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            // A header leans as the cells below it.
            let model = lines.get(at.max(1)).unwrap_or(line);
            let is_number = model[column].parse::<u64>().is_ok();
            text.push_str(&if is_number {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            });
        }
        writeln!(f, "{}", text.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_say_less_are_left_out() {
        let words = ["TLSv1.3", "TLSv1.3, the box's certificate", "TLSv1.3"];
        assert_eq!(
            all_of(words.into_iter().map(str::to_owned)),
            "TLSv1.3, the box's certificate"
        );
        assert_eq!(all_of(["b", "a"].into_iter().map(str::to_owned)), "a; b");
        assert_eq!(all_of(std::iter::empty()), "-");
    }
}
