package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// UnitPath is where the systemd unit goes.
const UnitPath = "/etc/systemd/system/isthmus-agent.service"

// Systemd says whether it is this host's init.
func Systemd() bool {
	st, err := os.Stat("/run/systemd/system")
	return err == nil && st.IsDir()
}

// Unit gives the agent's systemd unit. Envoy and the capture holder are its
// processes too, and go on while the agent is restarted: that is what
// KillMode=process is for. On a kernel that can't tie capture to its holder the
// redirects are swept once Envoy is gone.
func Unit(agent, config, user string) string {
	return fmt.Sprintf(`# Written by isthmus-agent join; removed by isthmus-agent leave.
[Unit]
Description=Isthmus agent
Documentation=https://isthmus.dev
Wants=network-online.target
After=network-online.target

[Service]
User=%[3]s
ExecStart=%[1]s run --config %[2]s
ExecStopPost=-%[1]s capture remove --unless-proxy-runs --config %[2]s
AmbientCapabilities=CAP_NET_ADMIN
CapabilityBoundingSet=CAP_NET_ADMIN
NoNewPrivileges=yes
Restart=always
RestartSec=1
KillMode=process
RuntimeDirectory=isthmus secrets/workload-spiffe-uds
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
`, agent, config, user)
}

// InstallService writes the unit and starts it, now and at each boot.
func (r *Record) InstallService(path, unit string) error {
	if err := r.note(Step{KindService, path}); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
		return err
	}
	if err := systemctl("daemon-reload"); err != nil {
		return err
	}
	return systemctl("enable", "--now", filepath.Base(path))
}

// StopService stops the agent, and leaves its Envoy.
func StopService(path string) error { return systemctl("stop", filepath.Base(path)) }

func removeService(path string) error {
	if _, err := os.Stat(path); err != nil {
		return nil
	}
	if err := systemctl("disable", "--now", filepath.Base(path)); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return systemctl("daemon-reload")
}

func systemctl(args ...string) error {
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// NoteProcess notes that an agent was started without systemd.
func (r *Record) NoteProcess(config string) error { return r.note(Step{KindProcess, config}) }

// Has says whether the record has a step.
func (r *Record) Has(k Kind) (target string, ok bool) {
	for _, s := range r.Steps {
		if s.Kind == k {
			return s.Target, true
		}
	}
	return "", false
}
