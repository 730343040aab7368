{{/* A list of values whose texts may be templates, as YAML; nothing if it is empty. Arguments: root, name. */}}
{{- define "mlflow.extra" -}}
{{- $root := index . 0 }}
{{- with index $root.Values (index . 1) }}
{{- tpl (toYaml .) $root }}
{{- end }}
{{- end }}

{{/* Names and paths that the chart itself uses are refused, whether or not these values use them: a later value might. */}}
{{- define "mlflow.checkExtra" -}}
{{- $volumes := list "data" "backup" "tmp" "run" "metrics" "guard" "provider" "tls" }}
{{- range include "mlflow.extra" (list . "extraVolumes") | fromYamlArray }}
{{- if has .name $volumes }}
{{- fail (printf "extraVolumes: the pod has a volume %q already: take another name" .name) }}
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- $paths := list "/data" "/etc/mlflow-guard" "/etc/mlflow-provider" "/etc/mlflow-tls" "/run/mlflow" "/run/mlflow/metrics" "/tmp" }}
{{- range include "mlflow.extra" (list . "extraVolumeMounts") | fromYamlArray }}
{{- if not (has .name $volumes) }}
{{- fail (printf "extraVolumeMounts: there is no volume %q: add it to extraVolumes" .name) }}
{{- end }}
{{- $path := clean .mountPath }}
{{- if has $path $paths }}
{{- fail (printf "extraVolumeMounts: something is mounted at %s already: take another mountPath" $path) }}
{{- end }}
{{- $paths = append $paths $path }}
{{- end }}
{{- $containers := list "prepare" "mlflow" "metrics" }}
{{- range $key := list "initContainers" "extraContainers" }}
{{- range include "mlflow.extra" (list $ $key) | fromYamlArray }}
{{- if has .name $containers }}
{{- fail (printf "%s: the pod has a container %q already: take another name" $key .name) }}
{{- end }}
{{- $containers = append $containers .name }}
{{- end }}
{{- end }}
{{- end }}
