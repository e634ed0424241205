#!/bin/sh
# Makes the user of dmsnap@.service, where the system has systemd. Nothing is started.
set -e
if command -v systemd-sysusers >/dev/null 2>&1; then
	systemd-sysusers dmsnap.conf
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
