//! A daemon that the tests of server, client and command line ask: every field set, two pools, one member down.

use std::{collections::BTreeMap, path::Path, sync::Arc, thread};

use tokio::net::UnixListener;

use super::{
    FlowPage, MemberOrder, Refusal, Source,
    query::FlowQuery,
    route::Route,
    server,
    view::{
        AttachmentView, CertificateView, ChangeView, ConfigView, DegradedView, ExplanationView,
        FlowView, KernelView, MemberView, PolicyView, PoolView, PortsView, Question, ReloadView,
        RuleView, SessionView, Stats, Status, Traffic, VirtualServerView,
    },
};

/// The JSON of every resource, as a person reads it with `--json`.
pub(crate) const GOLDEN: [(Route, &str); 11] = [
    (Route::Status, include_str!("golden/status.json")),
    (
        Route::VirtualServers,
        include_str!("golden/virtual-servers.json"),
    ),
    (Route::Pools, include_str!("golden/pools.json")),
    (Route::Members, include_str!("golden/members.json")),
    (Route::Flows, include_str!("golden/flows.json")),
    (Route::Sessions, include_str!("golden/sessions.json")),
    (Route::Stats, include_str!("golden/stats.json")),
    (Route::Policies, include_str!("golden/policies.json")),
    (
        Route::Certificates,
        include_str!("golden/certificates.json"),
    ),
    (Route::Config, include_str!("golden/config.json")),
    (Route::FlowCount, include_str!("golden/flow-count.json")),
];

/// Always says the same.
pub(crate) struct FakeSource;

/// Calls `test` with the path of a socket on which a [`FakeSource`] is served.
pub(crate) fn with_server(test: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let listener = server::bind(&path).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = UnixListener::from_std(listener).unwrap();
            tokio::select! {
                () = server::serve(listener, Arc::new(FakeSource)) => {}
                _ = stopped => {}
            }
        });
    });
    test(&path);
    drop(stop);
    serving.join().unwrap();
}

impl Source for FakeSource {
    fn status(&self) -> Status {
        Status {
            version: "0.1.0".into(),
            pid: 4711,
            generation: 3,
            mode: "mixed".into(),
            uptime_s: 183_845,
            kernel: KernelView {
                attachments: vec![
                    AttachmentView {
                        interface: "eth0".into(),
                        hook: "xdp".into(),
                        why: "the driver supports XDP".into(),
                    },
                    AttachmentView {
                        interface: "veth1".into(),
                        hook: "tcx".into(),
                        why: "a virtual link: TC keeps GSO".into(),
                    },
                ],
                degraded: vec![DegradedView {
                    lacks: "tcx".into(),
                    why: "TC programs hang on a clsact filter".into(),
                }],
                flows: 2,
                flows_max: 1_048_576,
            },
            workers: 2,
            virtual_servers: vec![
                VirtualServerView {
                    name: "smtps".into(),
                    address: "203.0.113.10:465".parse().unwrap(),
                    forward: "passthrough".into(),
                    client_tls: None,
                    pool: "mx-tls".into(),
                    state: "up".into(),
                    traffic: traffic(2, 1200),
                },
                VirtualServerView {
                    name: "submission6".into(),
                    address: "[2001:db8::10]:587".parse().unwrap(),
                    forward: "proxy".into(),
                    client_tls: Some("starttls-require".into()),
                    pool: "msa".into(),
                    state: "up".into(),
                    traffic: Traffic {
                        packets_in: 0,
                        packets_out: 0,
                        ..traffic(1, 30)
                    },
                },
            ],
            pools: vec![
                PoolView {
                    name: "msa".into(),
                    method: "round-robin".into(),
                    monitor: Some("smtp".into()),
                    members: vec![
                        member(
                            "msa",
                            "msa1",
                            "10.0.0.11:25",
                            "up",
                            Some("QUIT answered with 221"),
                        ),
                        member(
                            "msa",
                            "msa2",
                            "10.0.0.12:25",
                            "down",
                            Some("connect: connection refused"),
                        ),
                    ],
                },
                PoolView {
                    name: "mx-tls".into(),
                    method: "least-connections".into(),
                    monitor: None,
                    members: vec![member(
                        "mx-tls",
                        "10.0.0.21:465",
                        "10.0.0.21:465",
                        "up",
                        None,
                    )],
                },
            ],
        }
    }

    fn flows(&self, query: &FlowQuery) -> Result<FlowPage, Refusal> {
        if query.after > 0 {
            return Ok(FlowPage::default());
        }
        match query.virtual_server.as_deref() {
            None | Some("smtps") => {}
            Some("submission6") => return Ok(FlowPage::default()),
            Some(name) => {
                return Err(Refusal::unknown(format!(
                    "no virtual server is named \"{name}\"\n  The daemon knows: smtps, submission6."
                )));
            }
        }
        let flows = vec![FlowView {
            virtual_server: "smtps".into(),
            client: "198.51.100.7:40312".parse().unwrap(),
            address: "203.0.113.10:465".parse().unwrap(),
            member: "10.0.0.21:465".parse().unwrap(),
            snat: "10.0.0.1:20001".parse().unwrap(),
            phase: "established".into(),
            age_s: 75,
            idle_s: 2,
            bytes_in: 26_214_400,
            bytes_out: 1536,
            packets_in: 18_000,
            packets_out: 9000,
        }];
        Ok(FlowPage {
            flows,
            next: Some(7),
        })
    }

    fn count_flows(&self, _: &FlowQuery) -> Result<u64, Refusal> {
        Ok(1)
    }

    fn policies(&self) -> Vec<PolicyView> {
        let rule = |name: &str, action: &str, hits| RuleView {
            name: name.into(),
            enabled: true,
            action: action.into(),
            ranges: 2,
            vlans: vec![10],
            interfaces: vec!["eth0".into()],
            in_time: true,
            log: action == "drop",
            hits,
            staged_hits: 0,
        };
        vec![PolicyView {
            name: "edge".into(),
            enforced_by: vec!["smtps".into()],
            staged_by: vec![],
            rules: vec![rule("bad-net", "drop", 17), rule("default", "accept", 4321)],
        }]
    }

    fn certificates(&self) -> Vec<CertificateView> {
        vec![CertificateView {
            name: "mail".into(),
            host_names: vec!["mail.example.org".into(), "*.mx.example.org".into()],
            key: "ECDSA, 256 bits".into(),
            pin: "LCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCw=".into(),
            not_after: "2027-01-31T23:59:59Z".into(),
            days_left: 64,
            chain: "/etc/smtplb/mail.pem".into(),
            used_by: vec!["submission".into()],
            warnings: vec![],
        }]
    }

    fn explain(&self, question: &Question) -> Result<ExplanationView, Refusal> {
        if question.interface.as_deref() != Some("eth0") {
            return Err(Refusal::unknown("there is no such interface"));
        }
        Ok(ExplanationView {
            from: question.from,
            to: question.to,
            interface: "eth0".into(),
            vlan: question.vlan,
            verdict: "refused".into(),
            reason: Some("policy-drop".into()),
            virtual_server: Some("smtps".into()),
            forward: Some("passthrough".into()),
            rules: Vec::new(),
            pool: Some("mx-tls".into()),
            member: None,
            member_address: None,
            snat: None,
            snat_port: None,
            flow: None,
        })
    }

    fn config(&self) -> ConfigView {
        ConfigView {
            generation: 3,
            text: "mode = \"mixed\"\n".into(),
        }
    }

    fn reload(&self, dry_run: bool) -> Result<ReloadView, Refusal> {
        Ok(ReloadView {
            applied: !dry_run,
            generation: 3,
            changes: vec![ChangeView {
                object: "pool \"msa\"".into(),
                change: "changed".into(),
                details: vec!["method: \"round-robin\" → \"least-connections\"".into()],
            }],
            warnings: Vec::new(),
        })
    }

    fn set_member(&self, order: &MemberOrder) -> Result<MemberView, Refusal> {
        let members = self.status().into_members();
        let found = members
            .into_iter()
            .find(|member| member.pool == order.pool && member.name == order.member);
        let member = found.ok_or_else(|| Refusal::unknown("no such member"))?;
        Ok(MemberView {
            state: order.admin.word().into(),
            admin: order.admin.word().into(),
            deadline_s: order.deadline.map(|limit| limit.as_secs()),
            ..member
        })
    }

    fn sessions(&self) -> Vec<SessionView> {
        vec![
            SessionView {
                id: "1f-2".into(),
                virtual_server: "submission6".into(),
                client: "[2001:db8::7]:40313".parse().unwrap(),
                member: Some("msa/msa1".into()),
                phase: "data".into(),
                age_s: 12,
            },
            SessionView {
                id: "1f-3".into(),
                virtual_server: "submission6".into(),
                client: "[2001:db8::8]:40314".parse().unwrap(),
                member: None,
                phase: "connecting".into(),
                age_s: 0,
            },
        ]
    }

    fn stats(&self) -> Stats {
        Stats {
            drops: counters(&[("no-member", 0), ("no-flow", 17)]),
            events: counters(&[("sessions-accepted", 30), ("starttls-injection", 1)]),
            virtual_servers: BTreeMap::from([("smtps".into(), traffic(2, 1200))]),
            members: BTreeMap::from([
                ("msa/msa1".into(), traffic(1, 30)),
                ("mx-tls/10.0.0.21:465".into(), traffic(2, 1200)),
            ]),
            flow_records: counters(&[("half-open", 1), ("chunks", 2), ("chunks-max", 16_384)]),
            snat_ports: BTreeMap::from([(
                "10.0.0.1 > 10.0.0.21:465".into(),
                PortsView {
                    used: 2,
                    resting: 7,
                    usable: 31_744,
                },
            )]),
        }
    }
}

fn member(pool: &str, name: &str, address: &str, state: &str, reason: Option<&str>) -> MemberView {
    MemberView {
        pool: pool.into(),
        name: name.into(),
        address: address.parse().unwrap(),
        state: state.into(),
        state_s: 120,
        admin: "ready".into(),
        deadline_s: None,
        reason: reason.map(Into::into),
        traffic: traffic(3, 1230),
        kernel: traffic(2, 1200),
        proxy: Traffic {
            packets_in: 0,
            packets_out: 0,
            ..traffic(1, 30)
        },
    }
}

fn traffic(active: u64, total: u64) -> Traffic {
    Traffic {
        active,
        total,
        bytes_in: total * 40_000,
        bytes_out: total * 500,
        packets_in: total * 30,
        packets_out: total * 20,
    }
}

fn counters(of: &[(&str, u64)]) -> BTreeMap<String, u64> {
    of.iter()
        .map(|&(name, count)| (name.into(), count))
        .collect()
}
