{{/* A list of values whose texts may be templates, as YAML; empty for an empty list. Arguments: root, name. */}}
{{- define "mlflow.extra" -}}
{{- $root := index . 0 }}
{{- with index $root.Values (index . 1) }}
{{- tpl (toYaml .) $root }}
{{- end }}
{{- end }}

{{/* Rejects names and paths that the chart uses, even if the current values do not: later values might. */}}
{{- define "mlflow.checkExtra" -}}
{{- $volumes := list "data" "backup" "tmp" "run" "metrics" "guard" "provider" "tls" "database" }}
{{- range include "mlflow.extra" (list . "extraVolumes") | fromYamlArray }}
{{- if has .name $volumes }}
{{- fail (printf "extraVolumes: the chart already has a volume %q: use another name" .name) }}
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- $paths := list "/data" "/etc/mlflow-database" "/etc/mlflow-guard" "/etc/mlflow-provider" "/etc/mlflow-tls" "/run/mlflow" "/run/mlflow/metrics" "/tmp" }}
{{- range include "mlflow.extra" (list . "extraVolumeMounts") | fromYamlArray }}
{{- if not (has .name $volumes) }}
{{- fail (printf "extraVolumeMounts: volume %q does not exist: add it to extraVolumes" .name) }}
{{- end }}
{{- $path := clean .mountPath }}
{{- if has $path $paths }}
{{- fail (printf "extraVolumeMounts: the chart already mounts a volume at %s: use another mountPath" $path) }}
{{- end }}
{{- $paths = append $paths $path }}
{{- end }}
{{- $containers := list "prepare" "mlflow" "metrics" }}
{{- range $key := list "initContainers" "extraContainers" }}
{{- range include "mlflow.extra" (list $ $key) | fromYamlArray }}
{{- if has .name $containers }}
{{- fail (printf "%s: the chart already has a container %q: use another name" $key .name) }}
{{- end }}
{{- $containers = append $containers .name }}
{{- end }}
{{- end }}
{{- end }}
