//! Look-alikes of the end of a message, on their way through `line_endings = "normalize"` to everybody's mail servers.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options, Session},
    daemon::{
        Daemon,
        config::{ClientTls, Config},
    },
    lab::{Family, Lab, Plan},
    member::{Mta, Site},
    wait::wait_until,
};

const MTAS: [Mta; 3] = [Mta::Postfix, Mta::OpenSmtpd, Mta::Exim];

/// What one server or another has taken for the end of data.
const LOOK_ALIKES: [&str; 7] = [
    "\n.\n",
    "\n.\r\n",
    "\r\n.\n",
    "\r.\r",
    "\r\n.\r",
    "\r\n.\r\r\n",
    "\n.\r",
];

fn config(lab: &Lab) -> Config {
    let mut config = Config::new(lab, "tc");
    let address = Family::V4.virtual_address();
    config.pool(lab, "mx", Family::V4, 25, None);
    config.proxy("mx", address, 25, "mx", ClientTls::None);
    config.raw("line_endings = \"normalize\"");
    config
}

/// One session with a look-alike in its message, and a second message within it.
fn smuggle(id: &str, look_alike: &str) -> Result<()> {
    let options = Options {
        mode: Mode::Plain,
        ..Options::to((Family::V4.virtual_address(), 25).into())
    };
    let mut session = Session::open(&options, None)?;
    session.command("MAIL", "MAIL FROM:<sender@lab.example>", '2')?;
    session.command("RCPT", "RCPT TO:<inbox@lab.example>", '2')?;
    session.command("DATA", "DATA", '3')?;
    let content = format!(
        "Message-ID: <{id}@lab.example>\nSubject: x\r\r\n\r\ntext{look_alike}MAIL FROM:<evil@lab.example>\r\n\
         RCPT TO:<inbox@lab.example>\r\nDATA\r\nMessage-ID: <evil-{id}@lab.example>\r\n\r\nsmuggled\r\n."
    );
    session.command("content", &content, '2')?;
    session.quit();
    Ok(())
}

#[test]
fn one_message_in_is_one_message_out_at_every_server() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start_mixed(lab, &MTAS)?;
        let daemon = Daemon::start(lab, config(lab).text())?;
        daemon.wait_for_checked()?;
        let mut expected = 0;
        for (number, look_alike) in LOOK_ALIKES.iter().enumerate() {
            // In turn to each member.
            for turn in 0..MTAS.len() {
                let id = format!("normal-{number}-{turn}");
                let sent = lab.clients[0].namespace.enter(|| smuggle(&id, look_alike));
                sent.with_context(|| format!("{:?}", look_alike.escape_default()))?;
                expected += 1;
            }
        }
        wait_until(Duration::from_secs(60), "delivery", || {
            site.arrivals().is_ok_and(|all| all.len() >= expected)
        })?;
        let arrivals = site.arrivals()?;
        ensure!(arrivals.len() == expected, "{arrivals:?}");
        let mut members = BTreeMap::<_, usize>::new();
        for arrival in &arrivals {
            let id = arrival.id.as_deref().unwrap_or_default();
            ensure!(
                id.contains("normal-") && !id.contains("evil"),
                "{arrival:?}"
            );
            *members.entry(arrival.member.as_str()).or_default() += 1;
        }
        let each = members.values().all(|count| *count == LOOK_ALIKES.len());
        ensure!(members.len() == MTAS.len() && each, "{members:?}");
        daemon.wait_for_log(" normalized=1 ")
    })
}
